"""torch.compile: no graph breaks, the same numbers, and no write to the base from inside a graph."""

import pytest
import torch
from peft import get_peft_model

from sparse_peft import S2FTConfig, SaRAConfig, SLTrainConfig, SnellaConfig, SoRAConfig, SparseConfig
from tests.helpers.two_layers import TwoLayers, adapted, assert_base_untouched, layers_of

pytestmark = pytest.mark.compile


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gradients(model, forward, x):
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = forward(x)
    y.pow(2).sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("conv1d", [False, True])
def test_no_graph_break_and_equal_numbers(backend, conv1d):

    model, reference = adapted(TwoLayers(conv1d=conv1d))
    x = torch.randn(4, 17)
    eager = gradients(model, model, x)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for a, b in zip(eager, gradients(model, compiled, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    optimizer.step()
    assert_base_untouched(model, reference)
    for a, b in zip(gradients(model, model, x), gradients(model, compiled, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_graph_is_right_whether_or_not_the_base_holds_the_entries():
    model, _ = adapted()
    x = torch.randn(4, 17)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    expected = compiled(x)
    torch.testing.assert_close(model(x), expected)  # the base holds the entries from here on
    assert not layers_of(model)["first"].ledger.is_own
    torch.testing.assert_close(compiled(x), expected)
    with torch.no_grad():
        for layer in layers_of(model).values():
            layer.deltas["default"].values.mul_(2)
    after = compiled(x)
    torch.testing.assert_close(model(x), after)
    assert not torch.allclose(after, expected)


def test_adapters_may_be_switched_added_and_disabled_around_a_graph():
    model, reference = adapted()
    model.add_adapter("other", SparseConfig(density=0.3, target_modules=["first"], seed=3, init_weights=False))
    x = torch.randn(4, 17)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for names in ("default", "other", ["default", "other"]):
        model.base_model.set_adapter(names)
        torch.testing.assert_close(compiled(x), model(x))
    with model.disable_adapter():
        assert torch.equal(compiled(x), reference(x))


def test_loading_positions_is_seen_by_a_graph():
    model, _ = adapted()
    other, _ = adapted(seed=11)
    x = torch.randn(4, 17)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(x)
    model.load_state_dict({k: v for k, v in other.state_dict().items() if "sparse_peft_delta" in k}, strict=False)
    expected = compiled(x)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize(
    "config, whole",
    [
        (S2FTConfig(ratio=0.3), True),
        (S2FTConfig(ratio=0.3, side="out"), True),
        (SaRAConfig(density=0.2, progressive=None, nuclear_weight=0.0), True),
        (SoRAConfig(r=3), True),
        (SLTrainConfig(r=3, density=0.1), True),
        (SLTrainConfig(mode="pretrain", r=3, density=0.1), False),
        (SnellaConfig(r=4), False),
        (SnellaConfig(r=4, kernel="mixed", dropout=1e-9), False),
    ],
    ids=[
        "s2ft, inputs",
        "s2ft, outputs",
        "sara",
        "sora",
        "sltrain",
        "sltrain from scratch",
        "snell",
        "snella beside the base",
    ],
)
def test_other_methods_in_a_graph(config, whole):
    config.target_modules, config.init_weights = ["first", "second"], False
    model = get_peft_model(TwoLayers(), config)
    x = torch.randn(4, 17)
    eager = gradients(model, model, x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=whole)
    for a, b in zip(eager, gradients(model, compiled, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
