"""Results that are kept between passes are made anew after every way to change what they are made from."""

import pytest
import torch

from tests.helpers.every_method import CONFIGS, adapted

X = torch.linspace(-1, 1, 21).view(3, 7)
OPTIMIZERS = {
    "AdamW": lambda values: torch.optim.AdamW(values, lr=0.1, fused=True),
    "SGD": lambda values: torch.optim.SGD(values, lr=0.1, fused=True),
    "Adagrad": lambda values: torch.optim.Adagrad(values, lr=0.1, fused=True),
    "plain SGD": lambda values: torch.optim.SGD(values, lr=0.1),
}


def merged_output(model):
    model.merge_adapter()
    y = model(X)
    model.unmerge_adapter()
    return y


# {what is computed: (the active adapters, the computation)}
RESULTS = {
    "pass": (["default"], lambda model: model(X)),
    "union": (["default", "other"], lambda model: model(X)),
    "mixed batch": (["default"], lambda model: model(X, adapter_names=["other", "default", "other"])),
    "merged": (["default"], merged_output),
    "delta": (["default"], lambda model: model.base_model.model.first.get_delta_weight("other")),
}


def values_of(model):
    """All adapters' parameters, ready for an optimizer that no backward pass came before."""
    torch.manual_seed(3)
    found = [p for name, p in model.named_parameters() if ".default." in name or ".other." in name]
    for parameter in found:
        parameter.requires_grad_(True)
        parameter.grad = torch.randn_like(parameter)
    return found


def twin_of(model, method):
    """A model that has never computed, with the same values."""
    twin, _ = adapted(method)
    twin.load_state_dict(model.state_dict())
    return twin


@pytest.mark.parametrize(
    "result, optimizer",
    [*((name, "AdamW") for name in RESULTS), *(("mixed batch", name) for name in OPTIMIZERS if name != "AdamW")],
)
@pytest.mark.parametrize("method", CONFIGS)
@torch.no_grad()
def test_what_is_computed_after_a_step_is_current(method, result, optimizer):
    active, compute = RESULTS[result]
    model, _ = adapted(method)
    model.base_model.set_adapter(active)
    before = compute(model)
    assert torch.equal(compute(model), before)  # now from what is kept
    OPTIMIZERS[optimizer](values_of(model)).step()
    twin = twin_of(model, method)
    twin.base_model.set_adapter(active)
    after = compute(model)
    torch.testing.assert_close(after, compute(twin))
    assert not torch.allclose(after, before)


@pytest.mark.parametrize("result", RESULTS)
@pytest.mark.parametrize("method", CONFIGS)
@torch.no_grad()
def test_what_is_computed_after_other_values_were_loaded_is_current(method, result):
    active, compute = RESULTS[result]
    model, _ = adapted(method)
    model.base_model.set_adapter(active)
    before = compute(model)
    adapters = {name: p for name, p in model.named_parameters() if ".default." in name or ".other." in name}
    model.load_state_dict({name: 2 * p for name, p in adapters.items()}, strict=False)
    twin = twin_of(model, method)
    twin.base_model.set_adapter(active)
    after = compute(model)
    torch.testing.assert_close(after, compute(twin))
    assert not torch.allclose(after, before)
