"""LIFT's refresh: principal positions chosen anew from the trained weight, against the algorithm in float64."""

import json

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import nn

from sparse_peft import SparseConfig, SparsityController
from sparse_peft.support import Support, exchange_for, select
from tests.helpers.quantized import build
from tests.helpers.training_loop import batch_at, optimizer_of, train
from tests.helpers.two_layers import TwoLayers, layers_of

NAMES = ["first", "second"]
# Twice this rank covers the smaller side of each weight, where subspace iteration is exact.
RANK = 9


def adapted(base=None, **config):
    torch.manual_seed(0)
    config = {"density": 0.15, "reselect_every": 4, "principal_rank": RANK, "target_modules": NAMES, **config}
    config.setdefault("scale", 1.0)
    return get_peft_model(TwoLayers() if base is None else base, SparseConfig(selection="principal", **config))


def principal(weight, k, rank=RANK):
    """The positions of the ``k`` largest entries of the best approximation, by LAPACK's decomposition."""
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    score = ((u[:, :rank] * s[:rank]) @ vh[:rank]).abs().reshape(-1)
    return sorted(score.argsort(descending=True, stable=True)[:k].tolist())


class DenseLift:
    """AdamW on TwoLayers in float64 with dense weights; every few steps a mask from the present weight."""

    def __init__(self, base, counts, every, lr):
        self.w = {n: getattr(base, n).weight.detach().double() for n in counts}
        self.bias, self.every, self.lr, self.t = base.first.bias.detach().double(), every, lr, 0
        self.v = {n: dict.fromkeys(principal(self.w[n], k), 0.0) for n, k in counts.items()}
        self.m = {n: dict.fromkeys(v, (0.0, 0.0)) for n, v in self.v.items()}

    def trained(self, name):
        flat = self.w[name].reshape(-1).clone()
        flat[list(self.v[name])] += torch.tensor(list(self.v[name].values()), dtype=torch.float64)
        return flat.view_as(self.w[name])

    def step(self, x, y):
        self.t += 1
        w = {name: self.trained(name).requires_grad_() for name in self.w}
        hidden = torch.relu(x.double() @ w["first"].t() + self.bias)
        F.cross_entropy(hidden @ w["second"].t(), y).backward()
        for name, entries in self.v.items():
            gradient = w[name].grad.reshape(-1)
            for i in entries:
                m, v = self.m[name][i]
                m, v = 0.9 * m + 0.1 * float(gradient[i]), 0.999 * v + 0.001 * float(gradient[i]) ** 2
                self.m[name][i] = m, v
                update = (m / (1 - 0.9**self.t)) / ((v / (1 - 0.999**self.t)) ** 0.5 + 1e-8)
                entries[i] = entries[i] * (1 - self.lr * 0.01) - self.lr * update
            if self.t % self.every == 0:
                chosen = principal(self.trained(name), len(entries))
                self.v[name] = {i: entries.get(i, 0.0) for i in chosen}
                self.m[name] = {i: self.m[name].get(i, (0.0, 0.0)) for i in chosen}


@pytest.mark.parametrize("shape", [{}, {"n_in": 9, "hidden": 26, "n_out": 7}])
def test_the_refresh_is_the_algorithm(shape):
    torch.manual_seed(0)
    dense_base = TwoLayers(**shape)
    model = adapted(TwoLayers(**shape))
    for name in NAMES:
        getattr(dense_base, name).load_state_dict(layers_of(model)[name].base_layer.state_dict())
    supports = {name: layer.support("default").indices.tolist() for name, layer in layers_of(model).items()}
    dense = DenseLift(dense_base, {name: len(s) for name, s in supports.items()}, every=4, lr=0.03)
    assert supports == {name: sorted(entries) for name, entries in dense.v.items()}
    optimizer = optimizer_of(model, lr=0.03)
    controller = SparsityController(model, optimizer, total_steps=14)
    for step in range(14):
        x, y = batch_at(step, n_in=shape.get("n_in", 17), n_out=shape.get("n_out", 5))
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
        dense.step(x, y)
        for name, layer in layers_of(model).items():
            assert layer.support("default").indices.tolist() == sorted(dense.v[name]), f"step {step + 1}, {name}"
            expected = torch.tensor([dense.v[name][i] for i in sorted(dense.v[name])])
            torch.testing.assert_close(layer.deltas["default"].values.detach(), expected, rtol=1e-3, atol=1e-4)
    assert [record.step for record in controller.history] == [4, 8, 12]
    assert all(record.rate == 1.0 and record.replaced > 0 for record in controller.history)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_base_is_restored_and_dropped_entries_are_its_own(dtype):
    base = TwoLayers().to(dtype)
    weights = {name: getattr(base, name).weight.detach().clone() for name in NAMES}
    model = adapted(base)
    optimizer = optimizer_of(model, lr=0.05)
    controller = SparsityController(model, optimizer, total_steps=9)
    for step in range(9):
        x, y = batch_at(step)
        F.cross_entropy(model(x.to(dtype)).float(), y).backward()
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
    with model.disable_adapter():
        model(batch_at(0)[0].to(dtype))
        for name, layer in layers_of(model).items():
            assert torch.equal(layer.base_layer.weight, weights[name])
    merged = model.merge_and_unload()
    assert {name for name in NAMES if not torch.equal(getattr(merged, name).weight, weights[name])} == set(NAMES)


@pytest.mark.parametrize("config", [
    {"granularity": "block", "block_size": [3, 2]}, {"allocation": "erk"}, {"allocation": "global"},
], ids=["blocks", "erk", "global"])  # fmt: skip
def test_counts_stay_and_positions_move(config):
    model = adapted(**config)
    before = {name: layer.support("default") for name, layer in layers_of(model).items()}
    controller = SparsityController(model, optimizer_of(model, lr=0.03), total_steps=8)
    train(model, controller.optimizer, controller, range(8))
    after = {name: layer.support("default") for name, layer in layers_of(model).items()}
    assert {name: s.nnz for name, s in after.items()} == {name: s.nnz for name, s in before.items()}
    assert any(after[name] != before[name] for name in before)
    if "granularity" in config:
        for support in after.values():
            grid = [(r // 3, c // 2) for r, c in zip(support.rows.tolist(), support.cols.tolist(), strict=True)]
            assert len(set(grid)) * 6 == support.nnz


def test_the_trained_weight_has_the_scale_of_the_delta():
    model = adapted(scale=4.0, reselect_every=1)
    controller = SparsityController(model, optimizer_of(model, lr=0.02), total_steps=3)
    for step in range(3):
        x, y = batch_at(step)
        F.cross_entropy(model(x), y).backward()
        controller.optimizer.step()
        wanted = {
            name: principal((layer.get_base_weight() + layer.get_delta_weight("default")).double(),
                            layer.support("default").nnz)
            for name, layer in layers_of(model).items()
        }  # fmt: skip
        controller.step()
        controller.optimizer.zero_grad()
        assert {name: layer.support("default").indices.tolist() for name, layer in layers_of(model).items()} == wanted


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_quantised_bases_are_scored_as_trained(kind):
    model = adapted(build(kind), density=0.05, reselect_every=2)
    optimizer = optimizer_of(model, lr=0.05)
    controller = SparsityController(model, optimizer, total_steps=2)
    layer = layers_of(model)["first"]
    for _ in range(2):
        before = layer.support("default")
        model(torch.randn(8, 128)).square().mean().backward()
        optimizer.step()
        trained = layer.dequantised() + layer.get_delta_weight("default")
        controller.step()
        optimizer.zero_grad()
    found = layer.support("default")
    assert found == select("principal", trained.detach(), found.nnz, options={"r": RANK}) and found != before


def test_without_reselect_every_positions_stay(tmp_path):
    config = SparseConfig(selection="principal", density=0.1, target_modules=NAMES)
    assert config.reselect_every is None and not config.changes_in_training
    with pytest.raises(ValueError, match=r"only accumulated_gradient, .*, and principal with reselect_every, change"):
        config.reselection_schedule(10)
    # files of version 0.1.0 have the default of dynamic selections in it
    get_peft_model(TwoLayers(), config).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**content, "reselect_every": 20}))
    loaded = PeftModel.from_pretrained(TwoLayers(), tmp_path, is_trainable=True).peft_config["default"]
    assert loaded.reselect_every is None and not loaded.changes_in_training


def test_the_refresh_travels_with_the_adapter(tmp_path):
    adapted(reselect_every=7).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(TwoLayers(), tmp_path, is_trainable=True).peft_config["default"]
    assert loaded.reselect_every == 7 and loaded.changes_in_training


@pytest.mark.parametrize(("fields", "message"), [
    ({"redistribute": True}, "redistribute=True with selection='principal': layers are compared by observed"),
    ({"reselect_every": 0}, "reselect_every=0: an int of at least 1"),
    ({"accumulate": 5, "reselect_every": 3}, "accumulate=5 and reselect_every=3"),
])  # fmt: skip
def test_bad_configs(fields, message):
    with pytest.raises(ValueError, match=message):
        SparseConfig(selection="principal", **{"reselect_every": 10, **fields})


def test_training_without_a_controller_warns():
    model = adapted(nn.Sequential(nn.Linear(8, 6)), target_modules=["0"], density=0.3)
    model(torch.randn(2, 8)).sum().backward()
    with pytest.warns(UserWarning, match="nothing reselects its positions"):
        optimizer_of(model).step()


def test_an_exchange_leads_from_one_support_to_another():
    old, new = Support((3, 4), torch.tensor([0, 3, 5, 11])), Support((3, 4), torch.tensor([1, 3, 10, 11]))
    result = exchange_for(old, new, torch.tensor([0.5, 1.0, -2.0, 3.0]))
    assert result.support == new and result.source.tolist() == [-1, 1, -1, 3]
    assert result.replaced == 2 and result.drop_threshold == 2.0 and result.grow_threshold is None
    same = exchange_for(old, old, torch.ones(4))
    assert same.replaced == 0 and same.source.tolist() == [0, 1, 2, 3] and same.drop_threshold is None
