import copy

import pytest
import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from benchmarks.measure import LargestTensor
from sparse_peft import SparsityController, SSTConfig
from sparse_peft.dynamics.collectives import Collectives
from sparse_peft.dynamics.protocol import TrainingContext
from sparse_peft.ops import spectral_product
from sparse_peft.tuners.base_layer import TunerLayer
from sparse_peft.tuners.sst.dynamics import SSTDynamics
from tests.helpers.processes import run_on_two
from tests.helpers.quantized import build
from tests.helpers.training_loop import batch_at, optimizer_of, train, train_on_half
from tests.helpers.two_layers import TwoLayers

NAMES = ["first", "second"]


def sst(model=None, **config):
    config = SSTConfig(**{"target_modules": NAMES, "r": 3, "resample_every": 2, **config})
    return get_peft_model(TwoLayers() if model is None else model, config)


def layers(model):
    return {m.name: m for m in model.modules() if isinstance(m, TunerLayer)}


def states(model, adapter="default"):
    return {name: layer.deltas[adapter] for name, layer in layers(model).items()}


def whole(state):
    """The decomposition in float64: all vectors, the trained ones among them."""
    u, v = state.U_rest.double().clone(), state.V_rest.double().clone()
    u[:, state.active], v[state.active] = state.U.detach().double(), state.V.detach().double()
    return u, state.S.detach().double(), v


def trained(steps=7, seed=0, **config):
    torch.manual_seed(3)
    model = sst(seed=seed, **config)
    optimizer = optimizer_of(model)
    controller = SparsityController(model, optimizer, total_steps=12)
    train(model, optimizer, controller, range(steps))
    return model, controller, optimizer


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("shape", [(17,), (4, 17), (2, 3, 17), (0, 17)])
def test_output_and_enhanced_gradients(conv1d, shape):
    base = TwoLayers(conv1d=conv1d)
    model = sst(copy.deepcopy(base), init_weights=False)
    twin = copy.deepcopy(base).double()
    grads = {}
    for name, state in states(model).items():
        u, s, v = whole(state)
        weight = (u * s) @ v
        getattr(twin, name).weight.data = weight.t() if conv1d else weight
    for name, module in (("first", twin.first), ("second", twin.second)):
        module.weight.register_hook(lambda g, name=name: grads.__setitem__(name, g.t() if conv1d else g))
    x = torch.randn(*shape, requires_grad=True)
    z = x.detach().double().requires_grad_()
    out, want = model(x), twin(z)
    assert torch.allclose(out.double(), want, rtol=1e-4, atol=1e-4)
    up = torch.randn_like(out)
    out.backward(up)
    want.backward(up.double())
    assert torch.allclose(x.grad.double(), z.grad, rtol=1e-3, atol=1e-4)
    for name, state in states(model).items():
        u, _, v = whole(state)
        g, active = grads[name], state.active
        assert torch.allclose(state.S.grad.double(), torch.einsum("ok,oi,ki->k", u, g, v), rtol=1e-3, atol=1e-3)
        # without the singular values, by which autograd's would be smaller
        assert torch.allclose(state.U.grad.double(), g @ v[active].t(), rtol=1e-3, atol=1e-3)
        assert torch.allclose(state.V.grad.double(), u[:, active].t() @ g, rtol=1e-3, atol=1e-3)


def test_gradients_that_are_not_asked_for():
    x, u, s, v = (torch.randn(size, dtype=torch.float64) for size in ((5, 4), (3, 2), (2,), (2, 4)))
    s = s.abs().requires_grad_()
    want = torch.autograd.grad(((x @ v.t()) * s @ u.t()).sum(), s)
    assert torch.allclose(torch.autograd.grad(spectral_product(x, u, s, v).sum(), s)[0], want[0])
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, s: spectral_product(x, u, s, v), (x, s))


def test_starts_as_the_base_and_trains_as_many_numbers_as_promised():
    base = TwoLayers()
    model = sst(copy.deepcopy(base))
    x = torch.randn(4, 17)
    assert torch.allclose(model(x), base(x), atol=1e-5)
    for layer in layers(model).values():
        rows, cols = layer.stored_shape
        k = min(rows, cols)
        assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == 3 * (rows + cols) + k
        assert bool(layer.get_delta_weight("default").abs().max() < 1e-5)


def test_no_step_makes_a_tensor_of_the_weights_size():
    model = sst(nn.Sequential(nn.Linear(300, 200)), target_modules=["0"])
    x = torch.randn(8, 300)
    for action in (lambda: model(x).sum(), lambda: model(x).sum().backward()):
        with LargestTensor() as largest:
            action()
        assert 0 < largest.nbytes <= 4 * 8 * 300


def test_vectors_stay_normal_values_positive_and_others_rest():
    model = sst(resample_every=100)
    before = {name: whole(state) for name, state in states(model).items()}
    optimizer = optimizer_of(model, lr=0.3)
    train(model, optimizer, SparsityController(model, optimizer), range(4))
    for name, state in states(model).items():
        (u, s, v), (old_u, _, old_v) = whole(state), before[name]
        rest = torch.ones(s.numel(), dtype=torch.bool)
        rest[state.active] = False
        assert torch.equal(u[:, rest], old_u[:, rest]) and torch.equal(v[rest], old_v[rest])
        assert not bool((u[:, ~rest] == old_u[:, ~rest]).all())
        assert torch.allclose(u.norm(dim=0), torch.ones(1).double(), atol=1e-5) and bool((s >= 0).all())
        assert torch.allclose(v.norm(dim=1), torch.ones(1).double(), atol=1e-5)


def test_a_draw_changes_no_weight_and_a_round_makes_vectors_orthogonal():
    model = sst(r=3, resample_every=2, draws_per_round=2)
    optimizer = optimizer_of(model)
    train(model, optimizer, SparsityController(model, optimizer), range(1))
    context = TrainingContext("default", model.peft_config["default"], layers(model), optimizer, None, Collectives())
    dynamics = SSTDynamics(context)
    for draw in (1, 2):
        weights = {name: state.dense().double() for name, state in states(model).items()}
        drawn = {name: state.active.clone() for name, state in states(model).items()}
        record = dynamics.after_step(2)
        assert (record.draws, record.decomposed) == (draw, 0 if draw == 1 else 2) and (record.turned > 0) == (
            draw == 2
        )
        for name, state in states(model).items():
            assert torch.allclose(state.dense().double(), weights[name], rtol=1e-5, atol=1e-5)
            assert not torch.equal(state.active, drawn[name]) and state.active.unique().numel() == 3
            assert not bool(state.U_rest[:, state.active].any()) and not bool(state.V_rest[state.active].any())
            if draw == 2:
                u, s, v = whole(state)
                assert torch.allclose(u.t() @ u, torch.eye(s.numel()).double(), atol=1e-5)
                assert torch.allclose(v @ v.t(), torch.eye(s.numel()).double(), atol=1e-5)
                assert bool((s[:-1] >= s[1:]).all())


def test_draws_follow_the_singular_values():
    model = sst(nn.Sequential(nn.Linear(6, 6, bias=False)), target_modules=["0"], r=1)
    (state,) = states(model).values()
    state.S.data = torch.tensor([8.0, 4.0, 2.0, 1.0, 1.0, 0.0])
    chances = 0.5 / 6 + 0.5 * state.S.detach() / 16
    counts = torch.stack([state.drawn(number) for number in range(6000)]).flatten().bincount(minlength=6) / 6000
    assert torch.allclose(counts, chances, atol=4 * (0.25 / 6000) ** 0.5)
    again = sst(nn.Sequential(nn.Linear(6, 6, bias=False)), target_modules=["0"], r=1, seed=1)
    (other,) = states(again).values()
    other.S.data = state.S.data
    assert [int(state.drawn(n)) for n in range(20)] != [int(other.drawn(n)) for n in range(20)]


def test_moments_of_other_vectors_are_forgotten():
    model, _, optimizer = trained(steps=2, draws_per_round=2)
    for state in states(model).values():
        assert state.U not in optimizer.state and state.V not in optimizer.state
        assert optimizer.state[state.S]["step"] == 2  # no round is over
    model, _, optimizer = trained(steps=4, draws_per_round=2)
    assert not any(state.S in optimizer.state for state in states(model).values())


@pytest.mark.parametrize("at", [1, 2, 4, 5])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, at):
    want, controller, _ = trained(draws_per_round=2)
    first, _, optimizer = trained(steps=at, draws_per_round=2)
    first.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    torch.manual_seed(3)
    second = PeftModel.from_pretrained(TwoLayers(), tmp_path, is_trainable=True)
    optimizer = optimizer_of(second)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    resumed = SparsityController(second, optimizer, total_steps=12)
    train(second, optimizer, resumed, range(at, 7))
    assert torch.equal(second(batch_at(0)[0]), want(batch_at(0)[0])) and resumed.history == controller.history
    for name, state in states(second).items():
        for one, other in zip(state.state_dict().values(), states(want)[name].state_dict().values(), strict=True):
            assert torch.equal(one, other)


def test_training_learns_and_without_a_controller_warns():
    model, controller, _ = trained(steps=0, r=6)
    optimizer = optimizer_of(model)
    x, y = batch_at(0)
    first = torch.nn.functional.cross_entropy(model(x), y).item()
    controller.close()
    controller = SparsityController(model, optimizer, total_steps=40)
    for _ in range(40):
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
    assert torch.nn.functional.cross_entropy(model(x), y).item() < 0.5 * first
    assert len(controller.history) == 20 and controller.history[-1].logs()["sparsity/draws"] == 20
    model = sst()
    optimizer = optimizer_of(model)
    model(x).sum().backward()
    with pytest.warns(UserWarning, match="nothing normalises and draws its singular vectors"):
        optimizer.step()
    with pytest.warns(UserWarning, match="resample_every=200 is more than total_steps=5"):
        model = sst(resample_every=200)
        SparsityController(model, optimizer_of(model), total_steps=5)


def test_file_merge_and_unmerge(tmp_path):
    model, _, _ = trained()
    torch.manual_seed(3)
    base = TwoLayers()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    x = torch.randn(3, 17)
    want = model(x)
    assert torch.equal(loaded(x), want) and not torch.allclose(want, base(x), atol=1e-3)
    with loaded.disable_adapter():
        assert torch.equal(loaded(x), base(x))
    deltas = {name: layer.get_delta_weight("default") for name, layer in layers(loaded).items()}
    loaded.merge_adapter()
    assert torch.allclose(loaded(x), want, atol=1e-5)
    assert all(torch.equal(layer.get_delta_weight("default"), deltas[name]) for name, layer in layers(loaded).items())
    loaded.unmerge_adapter()
    assert torch.equal(loaded(x), want) and torch.equal(loaded.unload()(x), base(x))

    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for bad in ([0, 0, 1], [0, 1, 17], [-1, 0, 1]):
        tensors["base_model.model.first.sparse_peft_sst_adapter.active"] = torch.tensor(bad)
        with pytest.raises(ValueError, match="layer first: active has the singular values"):
            set_peft_model_state_dict(sst(), tensors)


def test_items_of_mixed_batches_are_no_sums_of_large_numbers():
    base = TwoLayers()
    model = sst(copy.deepcopy(base), init_weights=False).eval()
    for layer in layers(model).values():  # the output is not the base's, of which nothing may be left
        layer.base_layer.weight.data.mul_(1e6)
    x = torch.randn(3, 17)
    mixed = model(x, adapter_names=["default", "__base__", "default"])
    assert torch.allclose(mixed[::2], model(x[::2]), rtol=1e-6)


def test_several_adapters_and_mixed_batches():
    base = TwoLayers()
    model = sst(copy.deepcopy(base), init_weights=False)
    model.add_adapter("other", SSTConfig(r=2, target_modules=["second"], init_weights=False))
    x = torch.randn(3, 17)
    mixed = model.eval()(x, adapter_names=["default", "__base__", "other"])
    for row, name in enumerate(("default", "__base__", "other")):
        if name != "__base__":
            model.set_adapter(name)
        assert torch.allclose(mixed[row], base(x[row]) if name == "__base__" else model(x[row]), atol=1e-4)
    twin = copy.deepcopy(base).double()
    for name, layer in layers(model).items():
        for adapter in layer.deltas:
            getattr(twin, name).weight.data += layer.get_delta_weight(adapter).double()
    model.base_model.set_adapter(["default", "other"])
    assert torch.allclose(model(x).double(), twin(x.double()), atol=1e-4)


def test_a_reference_adapter_is_a_copy():
    model, _, _ = trained()
    config = model.peft_config["default"]
    model.add_adapter("ref", config)  # as TRL does
    for name, state in states(model, "ref").items():
        assert torch.equal(state.dense(), states(model)[name].dense())


def test_vectors_stay_float32():
    base = TwoLayers().to(torch.bfloat16)
    model = sst(copy.deepcopy(base))
    for state in states(model).values():
        assert {t.dtype for t in (*state.parameters(), state.U_rest, state.V_rest)} == {torch.float32}
    x = torch.randn(4, 17, dtype=torch.bfloat16)
    assert model(x).dtype == torch.bfloat16 and torch.allclose(model(x).float(), base(x).float(), atol=0.05)
    model = sst()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(x.float()).float()
        with model.disable_adapter():
            assert torch.allclose(found, model(x.float()).float(), atol=0.05)


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_a_quantised_base(kind):
    pytest.importorskip("bitsandbytes")
    model = sst(build(kind), init_weights=False)
    x = torch.randn(6, 128)
    want = x.double()
    for name, state in states(model).items():
        bias = layers(model)[name].get_base_layer().bias
        want = want @ state.dense().double().t() + (0 if bias is None else bias.double())
        want = torch.relu(want) if name == "first" else want
    assert torch.allclose(model(x).double(), want, rtol=1e-3, atol=1e-3 * want.abs().max().item())


def test_a_model_from_scratch():
    """Everything besides the layers trains whole; the result is a plain model."""
    torch.manual_seed(0)
    model = sst(TwoLayers(), target_modules=["first"], modules_to_save=["second"], r=4)
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"S", "U", "V", "weight"}
    optimizer = optimizer_of(model)
    train(model, optimizer, SparsityController(model, optimizer), range(6))
    x = torch.randn(3, 17)
    want = model(x)
    assert torch.allclose(model.merge_and_unload()(x), want, atol=1e-5)


def test_convolutions_are_refused():
    with pytest.raises(TypeError, match="Target module 0 of type Conv1d: singular vectors are those of linear layers"):
        sst(nn.Sequential(nn.Conv1d(3, 3, 3)), target_modules=["0"])


def on_rank(rank, folder):
    torch.manual_seed(3)
    train_on_half(sst(draws_per_round=2), rank, folder)


@pytest.mark.distributed
def test_two_processes_agree_to_the_bit_and_do_what_one_does(tmp_path):
    run_on_two(on_rank, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    model, _, _ = trained(draws_per_round=2)
    for one, other, state in zip(first, second, states(model).values(), strict=True):
        for name, tensor in state.state_dict().items():
            assert torch.equal(one[name], other[name])
            if name == "active":
                assert torch.equal(one[name], tensor)
        state_of_two = copy.deepcopy(state)
        state_of_two.load_state_dict(one)
        assert torch.allclose(state_of_two.dense(), state.dense(), atol=1e-3)
