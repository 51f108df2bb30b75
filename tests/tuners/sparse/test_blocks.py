"""Whole blocks: budgets, criteria, training, files, and the path that makes them cheap."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from sparse_peft import SparseConfig, select_support, use_backend
from sparse_peft.ops import plan_support_grad
from sparse_peft.support import Budget, block_scores, resolve_block_counts
from tests.helpers.two_layers import adapted, layers_of

BLOCK = (4, 8)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 50))


def blocks_of(support, block=BLOCK):
    """Row-major numbers of the blocks, checked to be whole and to be all there is."""
    mask = support.to_mask()
    down, across = mask.shape[0] // block[0], mask.shape[1] // block[1]
    whole = mask[: down * block[0], : across * block[1]].view(down, block[0], across, block[1])
    assert torch.equal(whole.any(3).any(1), whole.all(3).all(1))
    assert int(whole.sum()) == support.nnz
    return whole.all(3).all(1).reshape(-1).nonzero().squeeze(1)


def supports(model, name="default"):
    return {n: layer.support(name) for n, layer in layers_of(model).items()}


@pytest.mark.parametrize("selection", ["random", "magnitude", "magnitude_smallest", "principal"])
@pytest.mark.parametrize("budget", [{"density": 0.1}, {"num_params": 1000}, {"r": 2}])
def test_blocks_are_whole_and_keep_to_the_budget(selection, budget):
    config = SparseConfig(
        granularity="block",
        block_size=BLOCK,
        selection=selection,
        principal_rank=4,
        target_modules=["0", "2"],
        **budget,
    )
    model = get_peft_model(net(), config)
    shapes = {"0": (96, 64), "2": (50, 96)}
    wanted = {
        "density": 0.1 * (96 * 64 + 50 * 96),
        "num_params": 1000,
        "r": 2 * (96 + 64 + 50 + 96),
    }[next(iter(budget))]
    found = supports(model)
    assert sum(s.nnz for s in found.values()) == pytest.approx(wanted, abs=16)
    for name, support in found.items():
        assert support.shape == shapes[name] and len(blocks_of(support)) * 32 == support.nnz


def test_criteria_score_blocks_by_their_sums():
    base = net()
    weights = {"0": base[0].weight.abs(), "2": base[2].weight.abs()}
    config = SparseConfig(
        granularity="block", block_size=[4, 8], selection="magnitude", density=0.5, allocation="global",
        target_modules=["0", "2"],
    )  # fmt: skip
    found = supports(get_peft_model(net(), config))
    best = torch.cat([block_scores(w, BLOCK).reshape(-1) for w in weights.values()])
    count = sum(s.nnz for s in found.values()) // 32
    last = best.topk(count).values.amin()
    for name, support in found.items():
        expected = (block_scores(weights[name], BLOCK).reshape(-1) >= last).nonzero().squeeze(1)
        assert torch.equal(blocks_of(support), expected)


@pytest.mark.parametrize("selection", ["gradient", "fisher", "wanda", "movement", "gallop"])
def test_blocks_chosen_from_data(selection):
    base, data = net(), [torch.randn(8, 64), torch.randn(6, 64)]
    config = SparseConfig(
        granularity="block", block_size=BLOCK, selection=selection, density=0.1, target_modules=["0", "2"]
    )
    chosen = select_support(base, config, data, loss_fn=lambda model, x: model(x).square().mean())
    for support in chosen.supports.values():
        assert len(blocks_of(support)) * 32 == support.nnz
    if selection in ("gradient", "gallop"):
        gradients = []
        for x in data:
            base.zero_grad()
            base(x).square().mean().backward()
            gradients.append(base[0].weight.grad.clone())
        scores = sum(gradients).double().abs()
        if selection == "gallop":
            scores /= base[0].weight.detach().double().abs() + 1e-8
        sums = block_scores(scores, BLOCK).reshape(-1)
        best = sums.topk(chosen.supports["0"].nnz // 32).indices.sort().values
        assert torch.equal(blocks_of(chosen.supports["0"]), best)
        known = select_support(base, config, gradients={"0": sum(gradients), "2": base[2].weight.grad})
        assert known.supports["0"] == chosen.supports["0"]


@pytest.mark.parametrize("backend", ["auto", "tiles", "panels", "sampled"])
def test_training_blocks_is_training_their_entries(backend):
    base = nn.Sequential(nn.Linear(256, 320))
    config = SparseConfig(granularity="block", block_size=32, density=0.2, scale=1.0, target_modules=["0"])
    layer = get_peft_model(base, config).base_model.model[0]
    support = layer.support("default")
    assert plan_support_grad(support, torch.float32, support.device).path == "tiles"
    x, gradient = torch.randn(3, 7, 256), torch.randn(3, 7, 320)
    with use_backend(backend):
        (layer(x) * gradient).sum().backward()
    dense = gradient.reshape(-1, 320).double().t() @ x.reshape(-1, 256).double()
    got = layer.deltas["default"].values.grad
    torch.testing.assert_close(got.double(), dense.reshape(-1)[support.indices.long()], rtol=1e-5, atol=1e-5)


def test_blocks_are_saved_loaded_and_resumed(tmp_path):
    model, reference = adapted(granularity="block", block_size=(4, 4), density=0.3)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(reference, tmp_path)
    config = again.peft_config["default"]
    assert config.granularity == "block" and config.block == (4, 4)
    for name, layer in layers_of(model).items():
        other = layers_of(again)[name]
        assert other.support("default") == layer.support("default")
        assert torch.equal(other.deltas["default"].values, layer.deltas["default"].values)


def test_counts_are_whole_blocks_and_every_layer_has_one():
    shapes = {"a": (64, 64), "b": (9, 9)}
    counts = resolve_block_counts(shapes, Budget(density=0.1), (8, 8))
    assert counts["b"] == 64 and counts["a"] % 64 == 0
    assert resolve_block_counts(shapes, Budget(density=1.0), (8, 8)) == {"a": 4096, "b": 64}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"granularity": "row"}, "granularity='row': one of 'entry', 'block'"),
        ({"granularity": "block", "block_size": 0}, "block_size=0: an int of at least 1 or a list"),
        ({"granularity": "block", "block_size": [4]}, r"block_size=\[4\]"),
        ({"granularity": "block", "selection": "rigl"}, "selection='rigl': positions that change are single entries"),
        ({"granularity": "block", "selection": "threshold", "threshold": 0.1}, "it is for single entries"),
    ],
)
def test_bad_configs(fields, message):
    with pytest.raises(ValueError, match=message):
        SparseConfig(target_modules=["0"], **fields)


def test_a_layer_smaller_than_a_block_is_named():
    config = SparseConfig(granularity="block", block_size=64, target_modules=["0", "2"])
    with pytest.raises(
        ValueError, match=r"layer 2: no block of 64 x 64 \(block_size\) fits its stored weight of 50 x 96"
    ):
        get_peft_model(net(), config)
