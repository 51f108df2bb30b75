"""SoRA, SLTrain and SNELL on bitsandbytes bases: against the dequantised weight plus their delta, and merging."""

import pytest
import torch
from peft import get_peft_model

from sparse_peft import SLTrainConfig, SnellaConfig, SoRAConfig
from sparse_peft.tuners.delta_layer import TunerLayer
from tests.helpers.quantized import build

pytest.importorskip("bitsandbytes")

CONFIGS = [SoRAConfig, SLTrainConfig, SnellaConfig]


def adapted(kind, config_cls):
    return get_peft_model(build(kind), config_cls(r=4, target_modules=["first", "second"], init_weights=False))


def dense_output(model, x):
    for name in ("first", "second"):
        layer = getattr(model.base_model.model, name)
        weight = layer.dequantised().double() + layer.get_delta_weight("default").double()
        bias = layer.get_base_layer().bias
        x = x @ weight.t() + (0 if bias is None else bias.double())
        x = torch.relu(x) if name == "first" else x
    return x


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
@pytest.mark.parametrize("config_cls", CONFIGS)
def test_output_and_gradients(kind, config_cls):
    torch.manual_seed(0)
    model = adapted(kind, config_cls)
    x = torch.randn(6, 128)
    out = model(x)
    want = dense_output(model, x.double())
    scale = want.abs().max().item()
    assert (out.double() - want).abs().max().item() < (2e-2 if kind == "8bit" else 1e-3) * scale
    out.square().mean().backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(p.grad is not None and bool(p.grad.isfinite().all()) for p in trained.values())


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
@pytest.mark.parametrize("config_cls", CONFIGS)
def test_merge_rounds_and_unmerge_gives_every_bit_back(kind, config_cls):
    model = adapted(kind, config_cls).eval()
    x = torch.randn(3, 128)
    with torch.no_grad():
        before = model(x)
        with pytest.warns(UserWarning, match="rounds the merged weight"):
            model.merge_adapter()
        merged = model(x)
        assert not torch.equal(merged, before)
        assert (merged - before).abs().max() < 0.3 * before.abs().max()
        model.unmerge_adapter()
        assert torch.equal(model(x), before)
        mixed = model(x, adapter_names=["default", "__base__", "default"])
        torch.testing.assert_close(mixed[[0, 2]], before[[0, 2]], rtol=1e-2, atol=1e-2 * before.abs().max().item())


def test_a_cast_of_the_gates_behind_our_back_is_undone():
    model = adapted("4bit", SoRAConfig)
    layers = [m for m in model.modules() if isinstance(m, TunerLayer)]
    for layer in layers:  # as TRL does where the base is quantised
        for parameter in layer.deltas["default"].parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    model.train()
    with pytest.warns(UserWarning, match="gate of the adapter.*cast back"):
        model(torch.randn(2, 128))
    assert all(layer.deltas["default"].gate.dtype == torch.float32 for layer in layers)
