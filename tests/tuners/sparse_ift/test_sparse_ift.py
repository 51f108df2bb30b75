import copy
import math

import pytest
import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from benchmarks.measure import LargestTensor
from sparse_peft import SLTrainConfig, SparseIFTConfig, SparsityController, iso_budget
from sparse_peft.adapters import save_as_lora
from sparse_peft.tuners.base_layer import TunerLayer
from tests.helpers.processes import run_on_two
from tests.helpers.training_loop import batch_at, optimizer_of, train, train_on_half
from tests.helpers.two_layers import TwoLayers

NAMES = ["first", "second"]


def ift(model=None, random=True, **config):
    own = {"target_modules": NAMES, "r": 2, "sparsity": 0.75, "reselect_every": 2, "init_weights": not random}
    config = SparseIFTConfig(**{**own, **config})
    return get_peft_model(TwoLayers() if model is None else model, config)


def layers(model):
    return {m.name: m for m in model.modules() if isinstance(m, TunerLayer)}


def states(model, adapter="default"):
    return {name: layer.deltas[adapter] for name, layer in layers(model).items()}


def dense(state):
    """Both factors in float64, from positions and values."""
    found = []
    for factor, (rows, cols) in state.shapes.items():
        flat = torch.zeros(rows * cols, dtype=torch.float64)
        flat[getattr(state, f"{factor}_positions").long()] = getattr(state, f"{factor}_values").detach().double()
        found.append(flat.view(rows, cols).requires_grad_())
    return found


def trained(steps=7, **config):
    torch.manual_seed(3)
    model = ift(random=False, **config)
    optimizer = optimizer_of(model)
    controller = SparsityController(model, optimizer, total_steps=12)
    train(model, optimizer, controller, range(steps))
    return model, controller, optimizer


# ---------------------------------------------------------------------------------------------------- budgets


@pytest.mark.parametrize("shape", [(64, 32), (33, 17), (5, 1), (4096, 11008)])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.75, 0.9])
def test_budgets_never_exceed_the_dense_one_and_waste_little(shape, sparsity):
    outputs, inputs = shape
    for kind in ("wide", "parallel", "factorized", "doped"):
        found = iso_budget(kind, shape, sparsity)
        assert found.dense == outputs * inputs and found.parameters <= found.dense
        if kind in ("factorized", "doped"):
            assert found.parameters == found.dense
        if kind == "parallel":
            assert found.dense - found.parameters < found.branches == math.floor(1 / (1 - sparsity) + 1e-9)
        if kind == "wide":
            whole = [math.floor(side / math.sqrt(1 - sparsity) + 1e-9) for side in shape]
            assert list(found.width) == whole and found.entries <= (1 - sparsity) * math.prod(whole) + 1
    for r in (1, 8):
        found = iso_budget("factorized", shape, sparsity, r)
        assert found.rank == math.floor(r / (1 - sparsity) + 1e-9) and found.parameters == r * (outputs + inputs)
        found = iso_budget("doped", shape, sparsity, r)
        assert (found.rank, found.parameters) == (math.floor(sparsity * r), r * (outputs + inputs))


def test_bad_budgets_are_refused():
    for arguments, message in (
        (("thick", (4, 4), 0.5), r"kind='thick'.*'doped'"),
        (("wide", (4, 4), 1.0), r"sparsity=1.0"),
        (("wide", (4, 0), 0.5), r"shape"),
        (("wide", (4, 4), 0.5, 2), r"r=2 with kind='wide'.*'factorized'"),
    ):
        with pytest.raises(ValueError, match=message):
            iso_budget(*arguments)


@pytest.mark.parametrize("doped", [0.25, 0.5, 0.9])
def test_doped_is_sltrain_with_loras_parameters_in_each_layer(doped, tmp_path):
    base = TwoLayers(30, 40, 30)
    config = SLTrainConfig(r=8, doped=doped, target_modules=NAMES, init_weights=False)
    model = get_peft_model(copy.deepcopy(base), config)
    for layer in layers(model).values():
        found = iso_budget("doped", layer.stored_shape, doped, 8)
        state = layer.deltas["default"]
        assert (state.rank, state.values.numel()) == (found.rank, found.entries)
        assert sum(p.numel() for p in state.parameters()) == 8 * sum(layer.stored_shape)
    model.save_pretrained(tmp_path)
    x = torch.randn(3, 30)
    assert torch.equal(PeftModel.from_pretrained(base, tmp_path)(x), model(x))
    for fields, message in (
        ({"density": 0.1}, "doped=0.5 and density=0.1"),
        ({"allocation": "uniform"}, "doped=0.5 and allocation='uniform'"),
        ({"r": 1}, "doped=0.5 of r=1 is a rank of 0"),
        ({"r": 1, "doped": 1.0}, "doped=1.0 of r=1 is a rank of 1"),
    ):
        with pytest.raises(ValueError, match=message):
            SLTrainConfig(**{"r": 8, "doped": 0.5, **fields})


# ---------------------------------------------------------------------------------------------------- sparse factors


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("shape", [(17,), (4, 17), (2, 3, 17), (0, 17)])
def test_output_and_gradients_are_those_of_the_dense_factors(conv1d, shape):
    torch.manual_seed(0)
    base = TwoLayers(conv1d=conv1d)
    model = ift(copy.deepcopy(base))
    factors = {name: dense(state) for name, state in states(model).items()}

    def linear(name, x):
        module, (a, b) = getattr(base, name), factors[name]
        weight = module.weight.detach().double()
        weight = weight.t() if conv1d else weight
        bias = 0 if module.bias is None else module.bias.detach().double()
        return x @ (weight + 8 * b @ a).t() + bias  # alpha / r = 16 / 2

    x = torch.randn(*shape, requires_grad=True)
    z = x.detach().double().requires_grad_()
    out, want = model(x), linear("second", torch.relu(linear("first", z)))
    assert torch.allclose(out.double(), want, rtol=1e-4, atol=1e-3)
    up = torch.randn_like(out)
    out.backward(up)
    want.backward(up.double())
    assert torch.allclose(x.grad.double(), z.grad, rtol=1e-3, atol=1e-3)
    for name, state in states(model).items():
        for factor, whole in zip("AB", factors[name], strict=True):
            at = getattr(state, f"{factor}_positions").long()
            got = getattr(state, f"{factor}_values").grad
            assert torch.allclose(got.double(), whole.grad.flatten()[at], rtol=1e-3, atol=1e-2)


def test_starts_as_the_base_with_loras_parameters_and_more_ranks():
    base = TwoLayers()
    model = ift(copy.deepcopy(base), random=False)
    x = torch.randn(4, 17)
    assert torch.equal(model(x), base(x))
    for layer in layers(model).values():
        state = layer.deltas["default"]
        assert state.rank == 8 and sum(p.numel() for p in state.parameters()) == 2 * sum(layer.stored_shape)
        assert not torch.equal(state.A_positions, state.B_positions)


def test_no_step_makes_a_tensor_of_the_weights_size():
    model = ift(nn.Sequential(nn.Linear(300, 200)), target_modules=["0"])
    x = torch.randn(8, 300)
    for action in (lambda: model(x).sum(), lambda: model(x).sum().backward()):
        with LargestTensor() as largest:
            action()
        assert 0 < largest.nbytes <= 8 * 8 * 300  # a factor of 8 ranks, and its int64 positions


def test_an_exchange_is_rigls():
    """The smallest entries go, and those with the largest gradients of the step come, with zeros and no moments."""
    torch.manual_seed(3)
    model = ift(random=False, reselect_every=3, replace_rate=0.5, reselect_stop=100)
    optimizer = optimizer_of(model)
    controller = SparsityController(model, optimizer, total_steps=100)
    train(model, optimizer, controller, range(2))
    before = {name: dense(state) for name, state in states(model).items()}
    x, y = batch_at(2)
    base = model.get_base_model()

    def linear(name, x):
        layer, (a, b) = layers(model)[name], before[name]
        bias = 0 if layer.base_bias is None else layer.base_bias.detach().double()
        return x @ (layer.base_parameter.detach().double() + 8 * b @ a).t() + bias

    loss = torch.nn.functional.cross_entropy(linear("second", torch.relu(linear("first", x.double()))), y)
    loss.backward()
    torch.nn.functional.cross_entropy(base(x), y).backward()
    optimizer.step()
    after = {name: dense(state) for name, state in states(model).items()}
    (record,) = controller.step()
    total = 0
    for name, state in states(model).items():
        old, values = (found[name][0].detach().flatten() for found in (before, after))
        gradient, support = before[name][0].grad.flatten().abs(), state.support("A")
        had, has = old != 0, torch.zeros_like(old, dtype=torch.bool)
        has[support.indices.long()] = True
        dropped, grown = had & ~has, has & ~had
        count = int(support.nnz * 0.5 * (1 + math.cos(math.pi * 3 / 100)) / 2)
        total += int(grown.sum())
        assert int(dropped.sum()) == int(grown.sum()) <= count
        smallest = values[had].abs().sort().values[count - 1]
        assert values[dropped].abs().max() <= smallest and gradient[grown].min() >= gradient[~had & ~has].max()
        slots, moments = grown[support.indices.long()], optimizer.state[state.A_values]["exp_avg"]
        assert not bool(state.A_values[slots].any()) and not bool(moments[slots].any()) and bool(moments[~slots].any())
        assert torch.equal(state.A_values[~slots].double(), values[has & had])
    assert 0 < total <= record.replaced < record.entries


def test_positions_change_their_number_does_not_and_training_learns():
    model, controller, optimizer = trained(steps=0, r=4)
    counts = {name: state.A_values.numel() for name, state in states(model).items()}
    first = {name: state.A_positions.clone() for name, state in states(model).items()}
    x, y = batch_at(0)
    start = torch.nn.functional.cross_entropy(model(x), y).item()
    for _ in range(12):
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
    assert torch.nn.functional.cross_entropy(model(x), y).item() < 0.7 * start
    assert [record.step for record in controller.history] == [2, 4, 6, 8]  # to 0.75 of the run
    for name, state in states(model).items():
        assert state.A_values.numel() == counts[name] and not torch.equal(state.A_positions, first[name])
        assert state.support("A").indices.unique().numel() == counts[name]


@pytest.mark.parametrize("at", [1, 2, 3, 5])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, at):
    want, controller, _ = trained()
    first, _, optimizer = trained(steps=at)
    first.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    torch.manual_seed(3)
    second = PeftModel.from_pretrained(TwoLayers(), tmp_path, is_trainable=True)
    optimizer = optimizer_of(second)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    resumed = SparsityController(second, optimizer, total_steps=12)
    train(second, optimizer, resumed, range(at, 7))
    assert torch.equal(second(batch_at(0)[0]), want(batch_at(0)[0])) and resumed.history == controller.history


def test_accumulation_does_what_one_batch_does():
    runs = []
    for accumulation in (1, 3):
        torch.manual_seed(3)
        model = ift(random=False)
        optimizer = optimizer_of(model)
        train(model, optimizer, SparsityController(model, optimizer, 12), range(6), accumulation=accumulation)
        runs.append(states(model))
    for name, state in runs[0].items():
        assert torch.equal(state.A_positions, runs[1][name].A_positions)
        assert torch.allclose(state.A_values, runs[1][name].A_values, atol=1e-4)


def test_file_merge_lora_and_hostile_positions(tmp_path):
    model, _, _ = trained()
    torch.manual_seed(3)
    base = TwoLayers()
    model.save_pretrained(tmp_path / "ift")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ift")
    x = torch.randn(3, 17)
    want = model(x)
    assert torch.equal(loaded(x), want)
    loaded.merge_adapter()
    assert torch.allclose(loaded(x), want, atol=1e-5)
    loaded.unmerge_adapter()
    assert torch.equal(loaded(x), want) and torch.equal(loaded.unload()(x), base(x))
    assert save_as_lora(model, tmp_path / "lora").r == 8
    assert torch.allclose(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora")(x), want, atol=1e-5)

    tensors = load_file(tmp_path / "ift" / "adapter_model.safetensors")
    name = "base_model.model.first.sparse_peft_sparse_ift_adapter.A_positions"
    for damage, message in (
        (lambda t: t.flip(0), "must increase strictly"),
        (lambda t: t + 8 * 17, "0 to 135"),
        (lambda t: t[:-1], "A_positions is"),
        (lambda t: t.float(), "A_positions is"),
    ):
        with pytest.raises(ValueError, match=message):
            set_peft_model_state_dict(ift(), {**tensors, name: damage(tensors[name])})


def test_without_an_exchange_no_controller_is_needed():
    for fields in ({"replace_rate": None}, {"sparsity": 0.0}):
        assert not SparseIFTConfig(**fields).changes_in_training
    with pytest.warns(UserWarning, match="no position ever changes"):
        model = ift(reselect_every=50)
        SparsityController(model, optimizer_of(model), total_steps=20)


def on_rank(rank, folder):
    torch.manual_seed(3)
    train_on_half(ift(random=False), rank, folder, total_steps=12)


@pytest.mark.distributed
def test_two_processes_agree_to_the_bit_and_do_what_one_does(tmp_path):
    run_on_two(on_rank, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    model, _, _ = trained()
    for one, other, state in zip(first, second, states(model).values(), strict=True):
        for name, tensor in state.state_dict().items():
            assert torch.equal(one[name], other[name])
            close = torch.allclose(one[name], tensor, atol=1e-3) if tensor.is_floating_point() else None
            assert close or torch.equal(one[name], tensor), name
