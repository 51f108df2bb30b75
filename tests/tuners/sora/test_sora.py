import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from benchmarks.measure import LargestTensor
from sparse_peft import SoRAConfig
from sparse_peft.tuners.delta_layer import TunerLayer
from sparse_peft.tuners.sora.state import GatedLowRank
from tests.helpers.two_layers import TwoLayers

NAMES = ["first", "second"]


def sora(model=None, random=True, **config):
    config = SoRAConfig(**{"target_modules": NAMES, "r": 3, "alpha": 6, "init_weights": not random, **config})
    return get_peft_model(TwoLayers() if model is None else model, config)


def states(model, adapter="default"):
    return {m.name: m.deltas[adapter] for m in model.modules() if isinstance(m, TunerLayer)}


def dense(state):
    """The delta in float64 as a map from inputs to outputs, differentiable."""
    a, b, g = (p.detach().double().requires_grad_() for p in (state.A, state.B, state.gate))
    return state.scale * b @ torch.diag(g) @ a, (a, b, g)


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("shape", [(17,), (1, 17), (4, 17), (2, 3, 17), (0, 17)])
def test_output_and_gradients_are_those_of_the_dense_delta(conv1d, shape):
    torch.manual_seed(0)
    base = TwoLayers(conv1d=conv1d)
    model = sora(copy.deepcopy(base), r=5)
    x = torch.randn(*shape, requires_grad=True)
    deltas = {name: dense(state) for name, state in states(model).items()}
    z = x.detach().double().requires_grad_()

    def linear(module, delta, x):
        weight = module.weight.detach().double()
        weight = weight.t() if conv1d else weight
        return x @ (weight + delta).t() + (0 if module.bias is None else module.bias.detach().double())

    want = linear(base.second, deltas["second"][0], torch.relu(linear(base.first, deltas["first"][0], z)))
    out = model(x)
    assert torch.allclose(out.double(), want, rtol=1e-4, atol=1e-5)
    up = torch.randn_like(out)
    out.backward(up)
    want.backward(up.double())
    assert torch.allclose(x.grad.double(), z.grad, rtol=1e-4, atol=1e-5)
    for name, state in states(model).items():
        for got, wanted in zip((state.A, state.B, state.gate), deltas[name][1], strict=True):
            assert torch.allclose(got.grad.double(), wanted.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["Conv1d", "Conv2d", "Conv3d"])
def test_convolutions(kind):
    torch.manual_seed(0)
    dims = int(kind[4])
    layer = getattr(nn, kind)(3, 5, 3, stride=2, padding=1, padding_mode="circular")
    base = copy.deepcopy(layer)
    model = sora(nn.Sequential(layer), target_modules=["0"])
    (state,) = states(model).values()
    x = torch.randn(2, 3, *([7] * dims))
    base.weight.data += dense(state)[0].reshape(base.weight.shape).float()
    want = base(x)
    assert torch.allclose(model(x), want, atol=1e-4)
    assert torch.allclose(model(x[0]), want[0], atol=1e-4)
    model.merge_adapter()
    assert torch.allclose(model(x), want, atol=1e-4)


def test_grouped_convolutions_are_refused():
    with pytest.raises(TypeError, match=r"0.*2 groups"):
        sora(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), target_modules=["0"])


def test_starts_as_the_base_and_only_b_has_a_gradient():
    torch.manual_seed(0)
    base = TwoLayers()
    model = sora(copy.deepcopy(base), random=False)
    x = torch.randn(4, 17)
    assert torch.equal(model(x), base(x))
    model(x).square().sum().backward()
    for state in states(model).values():
        assert bool((state.gate.grad == 0).all()) and bool((state.A.grad == 0).all())
        assert bool((state.B.grad != 0).any())
        assert torch.equal(state.gate, torch.ones(3))


def test_without_penalty_a_step_is_loras():
    base = TwoLayers()
    models = []
    for config in (
        SoRAConfig(target_modules=NAMES, r=4, alpha=8, penalty=0.0),
        LoraConfig(target_modules=NAMES, r=4, lora_alpha=8),
    ):
        models.append(get_peft_model(copy.deepcopy(base), config))
    for name, state in states(models[0]).items():
        getattr(models[1].base_model.model, name).lora_A["default"].weight.data.copy_(state.A.data)
    x = torch.randn(6, 17)
    optimizers = []
    for model in models:
        trained = [p for n, p in model.named_parameters() if p.requires_grad and "gate" not in n]
        optimizers.append(torch.optim.SGD(trained, lr=0.1))
    for _ in range(3):
        outputs = [model(x) for model in models]
        assert torch.equal(*outputs)
        for output, optimizer in zip(outputs, optimizers, strict=True):
            optimizer.zero_grad()
            output.square().mean().backward()
            optimizer.step()


def test_a_rank_whose_gate_is_shut_has_no_gradient_but_the_gate_has():
    model = sora()
    state = states(model)["second"]
    state.gate.data[1] = 0
    model(torch.randn(5, 17)).square().sum().backward()
    assert bool((state.A.grad[1] == 0).all()) and bool((state.B.grad[:, 1] == 0).all())
    assert state.gate.grad[1] != 0


def test_gradcheck():
    state = GatedLowRank((5, 4), 3, 2.0, 0.0, "normal", "layer")
    parameters = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 5), (4, 3), (3,))]
    x = torch.randn(6, 5, dtype=torch.float64)

    def output(a, b, gate):
        for name, value in zip(("A", "B", "gate"), (a, b, gate), strict=True):
            state._parameters[name] = value
        down, up = state.factors()
        return x @ down.t() @ up.t()

    assert torch.autograd.gradcheck(output, parameters)


def test_no_step_makes_a_tensor_of_the_weights_size():
    layer = nn.Sequential(nn.Linear(300, 200))
    model = sora(layer, target_modules=["0"], r=2)
    x = torch.randn(8, 300)
    with LargestTensor() as largest:
        loss = model(x).sum()
    assert 0 < largest.nbytes <= 4 * 8 * 300
    with LargestTensor() as largest:
        loss.backward()
    assert 0 < largest.nbytes <= 4 * 8 * 300


def test_gates_stay_float32_and_exact_in_a_bfloat16_model():
    model = sora()
    gate = states(model)["first"].gate
    before = gate.detach().clone()
    model.to(torch.bfloat16)
    gate = states(model)["first"].gate
    assert gate.dtype == torch.float32 and torch.equal(gate, before)
    assert states(model)["first"].A.dtype == torch.bfloat16
    assert model(torch.randn(2, 17, dtype=torch.bfloat16)).dtype == torch.bfloat16
    wrapped = get_peft_model(
        TwoLayers().to(torch.bfloat16), SoRAConfig(target_modules=NAMES), autocast_adapter_dtype=False
    )
    assert states(wrapped)["first"].gate.dtype == torch.float32


def test_safe_merge_changes_nothing_where_values_are_not_finite():
    model = sora()
    weight = model.base_model.model.second.base_layer.weight
    before = weight.detach().clone()
    states(model)["second"].B.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"NaNs detected.*layer second"):
        model.base_model.model.second.merge(safe_merge=True)
    assert torch.equal(weight, before) and not model.base_model.model.second.merged


def test_file_keeps_zeros_and_gates(tmp_path):
    model = sora(save_dtype="bfloat16")
    for state in states(model).values():
        state.gate.data[1] = 0
        state.A.data = state.A.data.bfloat16().float()
        state.B.data = state.B.data.bfloat16().float()
    base = TwoLayers()
    base.load_state_dict(
        {k.replace("base_layer.", ""): v for k, v in model.base_model.model.state_dict().items() if "adapter" not in k}
    )
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert set(tensors) == {
        f"base_model.model.{name}.sparse_peft_sora_adapter.{part}" for name in NAMES for part in ("A", "B", "gate")
    }
    assert tensors["base_model.model.first.sparse_peft_sora_adapter.gate"].dtype == torch.float32
    loaded = PeftModel.from_pretrained(base, str(tmp_path))
    x = torch.randn(3, 17)
    assert torch.equal(loaded(x), model(x))
    for name, state in states(loaded).items():
        assert state.gate[1] == 0 and torch.equal(state.gate, states(model)[name].gate)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda t: t.pop("base_model.model.first.sparse_peft_sora_adapter.B"), "no B for layer first"),
        (
            lambda t: t.update({"base_model.model.first.sparse_peft_sora_adapter.A": torch.zeros(3, 5)}),
            r"layer first: A is.*\(3, 5\).*\(3, 17\)",
        ),
        (
            lambda t: t["base_model.model.second.sparse_peft_sora_adapter.gate"].fill_(float("inf")),
            r"layer second \(gate\).*3 of 3",
        ),
    ],
)
def test_damaged_files_are_refused(tmp_path, damage, message):
    model = sora()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    damage(tensors)
    with pytest.raises(ValueError, match=message):
        set_peft_model_state_dict(sora(), tensors)


def test_ranks_of_single_layers():
    model = sora(rank_pattern={"second": 7})
    assert {name: state.rank for name, state in states(model).items()} == {"first": 3, "second": 7}
    assert model.peft_config["default"].ranks == {"first": 3, "second": 7}


def test_paper_settings():
    config = SoRAConfig.paper(r=4)
    assert (config.r, config.prox, config.operator, config.penalty) == (4, "constant", "reference", 3e-4)
    torch.manual_seed(0)
    gate = GatedLowRank((8, 8), 2000, 1.0, 0.0, config.init_gate, "layer").gate
    assert abs(float(gate.detach().mean())) < 0.1 and abs(float(gate.detach().std()) - 1) < 0.1


@pytest.mark.parametrize(
    "fields, error, message",
    [
        ({"prox": "soft"}, ValueError, "prox='soft'.*'lr'"),
        ({"operator": "hard"}, ValueError, "operator='hard'.*'soft'"),
        ({"init_gate": "zeros"}, ValueError, "init_gate='zeros'.*'ones'"),
        ({"r": 0}, ValueError, "r=0.*at least 1"),
        ({"r": 2.0}, TypeError, "r=2.0.*int"),
        ({"penalty": -1}, ValueError, "penalty=-1.*at least 0"),
        ({"dropout": 1.0}, ValueError, "dropout=1.0"),
        ({"prox_start": 1.5}, ValueError, "prox_start=1.5"),
        ({"target_rank": 0}, ValueError, "target_rank=0"),
        ({"target_rank": 1.5}, ValueError, "target_rank=1.5.*share"),
        ({"rank_pattern": {"(": 2}}, ValueError, "rank_pattern.*regular expression"),
        ({"stages": 3, "stage_spacing": "geometric"}, ValueError, "stage_spacing='geometric'"),
    ],
)
def test_errors_name_the_field(fields, error, message):
    with pytest.raises(error, match=message):
        SoRAConfig(**fields)


def test_a_target_above_all_ranks_is_refused():
    with pytest.raises(ValueError, match=r"target_rank=99.*6 ranks"):
        sora(target_rank=99)
