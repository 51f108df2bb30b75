"""Forward and backward of the layer against a dense float64 reference."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import func
from torch.utils.checkpoint import checkpoint

from sparse_peft import SketchConfig, SnellaConfig, SparseConfig, base_weights, panel_limit, use_backend
from sparse_peft.ops import backends
from sparse_peft.tuners.sources import OverlaySource, ResidentSource
from tests.helpers import every_method
from tests.helpers.two_layers import (
    TwoLayers,
    adapted,
    assert_base_untouched,
    effective_weights,
    layers_of,
    oracle_output,
)

TOLERANCE = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-10},
    torch.float32: {"rtol": 1e-4, "atol": 1e-4},
    torch.bfloat16: {"rtol": 5e-2, "atol": 0.25},
}


def check_against_oracle(model, reference, x, tol, names=("default",), forward=None):
    model.zero_grad()
    x = x.detach().requires_grad_()
    y = (forward or model)(x)
    grad = torch.randn_like(y)
    y.backward(grad)
    weights = effective_weights(model, reference, names)
    xd = x.detach().double().requires_grad_()
    yd = oracle_output(reference, weights, xd)
    yd.backward(grad.double())
    torch.testing.assert_close(y.double(), yd, **tol)
    torch.testing.assert_close(x.grad.double(), xd.grad, **tol)
    for name, layer in layers_of(model).items():
        for adapter in names:
            if adapter in layer.deltas:
                gathered = weights[name].grad.reshape(-1)[layer.support(adapter).indices.long()]
                torch.testing.assert_close(layer.deltas[adapter].values.grad.double(), gathered, **tol)


@pytest.mark.parametrize("conv1d", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("resident", [True, False], ids=["resident", "overlay"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 17), (2, 3, 17), (1, 17), (17,)], ids=str)
def test_layer_equals_the_dense_reference(conv1d, resident, dtype, shape):
    model, reference = adapted(TwoLayers(conv1d=conv1d).to(dtype), resident=resident)
    if dtype == torch.float64:
        model.double()
    check_against_oracle(model, reference, torch.randn(shape).to(dtype), TOLERANCE[dtype])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("density", [0.001, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("backend", ["auto", "sampled", "panels"])
def test_densities_biases_and_backends(bias, density, backend):
    model, reference = adapted(TwoLayers(bias=bias), density=density)
    with use_backend(backend):
        check_against_oracle(model, reference, torch.randn(6, 17), TOLERANCE[torch.float32])


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("conv1d", [False, True])
def test_small_panels_change_nothing(resident, conv1d):
    model, reference = adapted(TwoLayers(conv1d=conv1d), resident=resident)
    with panel_limit(256):
        check_against_oracle(model, reference, torch.randn(6, 17), TOLERANCE[torch.float32])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            check_against_oracle(model, reference, torch.randn(6, 17), TOLERANCE[torch.bfloat16])


def test_gradcheck():
    model, _ = adapted(TwoLayers(4, 6, 3))
    model.double()
    values = [p for n, p in model.named_parameters() if n.endswith("values")]
    for resident in (True, False):
        for layer in layers_of(model).values():
            layer.resident = resident
        x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
        # gradcheck perturbs through .data, which leaves no trace: the layers are told
        assert torch.autograd.gradcheck(lambda x, *_: _fresh(model)(x), (x, *values), fast_mode=False)


def _fresh(model):
    for layer in layers_of(model).values():
        layer.release()
    return model


@pytest.mark.parametrize("shape", [(0, 17), (2, 0, 17)])
def test_empty_batch(shape):
    model, _ = adapted()
    x = torch.randn(shape, requires_grad=True)
    y = model(x)
    assert y.shape == (*shape[:-1], 5)
    y.sum().backward()
    assert x.grad.shape == shape
    for layer in layers_of(model).values():
        assert not layer.deltas["default"].values.grad.any()


def test_zero_values_give_the_base_output_bit_for_bit():
    model, reference = adapted(init_weights=True)
    x = torch.randn(5, 17)
    assert torch.equal(model(x), reference(x))


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("resident", [True, False])
def test_autocast_follows_a_plain_layer(weight_dtype, resident):
    model, reference = adapted(TwoLayers().to(weight_dtype), resident=resident)
    x = torch.randn(6, 17).to(weight_dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, yb = model(x), reference(x)
    assert y.dtype == yb.dtype == torch.bfloat16
    y.float().sum().backward()
    for layer in layers_of(model).values():
        assert layer.deltas["default"].values.grad.dtype == torch.float32
        assert layer.deltas["default"].values.grad.abs().sum() > 0
    merged = model.merge_and_unload()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(y, merged(x), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant):
    model, reference = adapted()
    check_against_oracle(
        model,
        reference,
        torch.randn(4, 17),
        TOLERANCE[torch.float32],
        forward=lambda x: checkpoint(model, x, use_reentrant=use_reentrant),
    )


def test_gradient_accumulation_equals_the_whole_batch():
    model, _ = adapted()
    x = torch.randn(8, 17)
    values = [p for n, p in model.named_parameters() if n.endswith("values")]
    model(x).pow(2).sum().backward()
    whole = [p.grad.clone() for p in values]
    model.zero_grad()
    for part in x.split(2):
        model(part).pow(2).sum().backward()
    for p, w in zip(values, whole, strict=True):
        torch.testing.assert_close(p.grad, w, rtol=1e-4, atol=1e-4)


def test_trainable_bias_gets_its_gradient():
    model, reference = adapted(bias="sparse_peft_delta_only")
    x = torch.randn(3, 17)
    model(x).sum().backward()
    reference(x)
    bias = layers_of(model)["first"].base_layer.bias
    assert bias.requires_grad
    values = effective_weights(model, reference)
    hidden = x.double() @ values["first"].t() + bias.double()
    expected = ((hidden > 0).double() * values["second"].sum(0)).sum(0)
    torch.testing.assert_close(bias.grad.double(), expected, rtol=1e-4, atol=1e-4)


def test_several_adapters_add_up_and_each_gets_its_own_gradient():
    model, reference = adapted(density=0.4)
    config = model.peft_config["default"]
    for name, seed, density in (("other", 5, 0.3), ("third", 6, 0.5)):
        twin = type(config)(target_modules=["first"], density=density, seed=seed, init_weights=False, scale=1.0)
        model.add_adapter(name, twin)
    model.base_model.set_adapter(["default", "other", "third"])
    check_against_oracle(
        model, reference, torch.randn(4, 17), TOLERANCE[torch.float32], names=("default", "other", "third")
    )
    model.base_model.set_adapter("other")
    check_against_oracle(model, reference, torch.randn(4, 17), TOLERANCE[torch.float32], names=("other",))


def test_trainable_base_falls_back_and_both_get_gradients():
    model, reference = adapted()
    layer = layers_of(model)["first"]
    layer.base_layer.weight.requires_grad_(True)
    check_against_oracle(model, reference, torch.randn(4, 17), TOLERANCE[torch.float32])
    assert layer.base_layer.weight.grad.abs().sum() > 0
    assert torch.equal(layer.base_layer.weight, reference.first.weight)


def test_inputs_of_another_dtype_are_refused_in_training_as_in_inference():
    model, _ = adapted(TwoLayers().to(torch.bfloat16))
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="dtype"):
            model(torch.randn(2, 17))


def test_another_tuners_layer_below_ours_acts_too():
    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["first"], init_lora_weights=False), TwoLayers())
    x = torch.randn(3, 17)
    below = model.first(x).detach()
    model = inject_adapter_in_model(
        SparseConfig(density=0.2, target_modules=["first"], init_weights=False), model, adapter_name="ours"
    )
    expected = below + x @ model.first.get_delta_weight("ours").t()
    torch.testing.assert_close(model.first(x), expected)


def test_hooks_on_the_base_layer_run():
    model, reference = adapted()
    seen = []
    layers_of(model)["first"].base_layer.register_forward_hook(lambda m, args, out: seen.append(out))
    check_against_oracle(model, reference, torch.randn(4, 17), TOLERANCE[torch.float32])
    assert len(seen) == 1


@pytest.mark.parametrize("make", ["shared_storage", "strided"])
def test_weights_that_must_not_be_written_use_the_overlay(make):
    model, reference = adapted()
    layer = layers_of(model)["first"]
    weight = layer.base_layer.weight
    if make == "shared_storage":
        flat = torch.cat([weight.detach().reshape(-1), torch.zeros(3)])
        weight.data = flat[: weight.numel()].view(weight.shape)
    else:
        weight.data = weight.detach().t().contiguous().t()
    assert not layer._may_be_resident()
    check_against_oracle(model, reference, torch.randn(4, 17), TOLERANCE[torch.float32])
    assert layer.ledger.is_own


def test_both_sources_agree_bit_for_bit():
    model, _ = adapted(TwoLayers().to(torch.bfloat16))
    layer = layers_of(model)["first"]
    delta = layer._join(("default",))
    (_, _, a), (_, _, b) = (
        next(iter(source(layer, delta).panels(torch.bfloat16))) for source in (OverlaySource, ResidentSource)
    )
    assert torch.equal(a, b)


def test_inference_mode_first_then_training():
    model, reference = adapted()
    x = torch.randn(4, 17)
    with torch.inference_mode():
        out = model(x)
    torch.testing.assert_close(out.clone(), model(x).detach())
    check_against_oracle(model, reference, x, TOLERANCE[torch.float32])


def test_no_grad_forward_is_the_base_layers_own_call(monkeypatch):
    model, _ = adapted()
    layer = layers_of(model)["first"]
    x = torch.randn(1, 17)
    with torch.no_grad():
        first = layer(x)
        calls = []
        monkeypatch.setattr(layer, "hold", lambda *a: calls.append(a))
        assert torch.equal(layer(x), first)
    assert not calls  # nothing was rewritten: the values did not change


def test_log_of_a_slower_path_is_written_once(caplog):
    backends._logged.clear()
    model, _ = adapted(resident=False)
    with caplog.at_level("INFO", logger="sparse_peft"):
        for _ in range(3):
            model(torch.randn(2, 17))
    assert len([r for r in caplog.records if "layer first" in r.message]) == 1


# ---------------------------------------------------------------------------------------------------------- torch.func


def other_values(model):
    torch.manual_seed(5)
    return {name: torch.randn_like(p).requires_grad_() for name, p in model.named_parameters() if p.requires_grad}


def layer_of(name):
    return "first" if ".first." in name else "second"


def dense_weights(model, reference, values):
    """``effective_weights`` with other values, differentiable in these."""
    weights = {}
    for name, tensor in values.items():
        layer, base = layer_of(name), getattr(reference, layer_of(name)).weight.detach().double()
        delta = layers_of(model)[layer].deltas["default"]
        entries = tensor.double() * delta.value_scale
        weights[layer] = base.reshape(-1).index_add(0, delta.support.indices.long(), entries).view(base.shape)
    return weights


@pytest.mark.parametrize("conv1d", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("resident", [True, False], ids=["resident", "overlay"])
def test_functional_call_computes_with_the_parameters_it_is_given(resident, conv1d):
    model, reference = adapted(TwoLayers(conv1d=conv1d), resident=resident, scale=0.5)
    x, values = torch.randn(4, 17), other_values(model)
    before = model(x)
    y = func.functional_call(model, values, x)
    expected = oracle_output(reference, dense_weights(model, reference, values), x.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(model(x), before)  # the backward pass is that of the values that were given
    y.pow(2).sum().backward()
    grads = torch.autograd.grad(expected.pow(2).sum(), list(values.values()))
    for tensor, grad in zip(values.values(), grads, strict=True):
        torch.testing.assert_close(tensor.grad, grad, rtol=1e-3, atol=1e-3)
    assert torch.equal(model(x), before)
    with base_weights(model):
        assert_base_untouched(model, reference)


def test_functional_call_with_another_base_weight_leaves_the_own_one():
    model, reference = adapted()
    x, name = torch.randn(4, 17), "base_model.model.first.base_layer.weight"
    before = model(x)
    other = torch.randn_like(reference.first.weight)
    with torch.no_grad():
        y = func.functional_call(model, {name: other}, x)
    weights = effective_weights(model, reference)
    weights["first"] = other.double() + layers_of(model)["first"].get_delta_weight("default").double()
    expected = oracle_output(reference, weights, x.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(model(x), before)
    with base_weights(model):
        assert_base_untouched(model, reference)


@pytest.mark.parametrize("ready", [True, False], ids=["after a pass", "first"])
def test_transforms_of_torch_func(ready):
    model, reference = adapted()
    x, values = torch.randn(4, 17), other_values(model)
    if ready:
        model(x)  # the weight holds entries

    def loss(values, x):
        return func.functional_call(model, values, x).pow(2).mean()

    found = func.grad(loss)(values, x)
    dense = oracle_output(reference, dense_weights(model, reference, values), x.double()).pow(2).mean()
    for a, b in zip(found.values(), torch.autograd.grad(dense, list(values.values())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    stacked = {name: torch.stack([tensor, -tensor]).detach() for name, tensor in values.items()}
    each = [loss({name: tensor[i] for name, tensor in stacked.items()}, x) for i in range(2)]
    torch.testing.assert_close(func.vmap(loss, (0, None))(stacked, x), torch.stack(each), rtol=1e-4, atol=1e-5)
    with base_weights(model):
        assert_base_untouched(model, reference)


@pytest.mark.parametrize("method", ["sparse", "sara", "s2ft", "sltrain", "sora"])
def test_gradients_of_torch_func_are_those_of_autograd(method):
    model, reference = every_method.adapted(method)
    x = torch.randn(3, 7)
    values = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    found = func.grad(lambda values: func.functional_call(model, values, x).pow(2).sum())(values)
    model(x).pow(2).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-4)
    assert every_method.is_base(model, reference)


@pytest.mark.parametrize("config", [SnellaConfig(r=4), SketchConfig(bits=2)], ids=["snella", "sketch"])
def test_methods_without_transforms_say_so_and_take_functional_call(config):
    config.target_modules = "all-linear"
    model, x = get_peft_model(TwoLayers(), config), torch.randn(2, 17)
    values = {name: p.detach() * 1.5 for name, p in model.named_parameters() if p.requires_grad}
    twin = copy.deepcopy(model)
    twin.load_state_dict(values, strict=False)
    torch.testing.assert_close(func.functional_call(model, values, x), twin(x))
    with pytest.raises(RuntimeError, match=r"layer first: .* has no torch\.func\.grad"):
        func.grad(lambda values: func.functional_call(model, values, x).sum())(values)
