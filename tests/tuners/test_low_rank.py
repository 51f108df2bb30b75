"""Methods with low-rank factors: merging and mixed batches."""

import copy

import pytest
import torch
from peft import get_peft_model
from torch.testing import assert_close

from sparse_peft import SLTrainConfig, SoRAConfig
from sparse_peft.tuners.base_layer import TunerLayer
from tests.helpers.two_layers import TwoLayers

NAMES = ["first", "second"]
CONFIGS = {
    "sora": lambda **fields: SoRAConfig(**{"r": 3, "alpha": 6, **fields}),
    "sltrain": lambda **fields: SLTrainConfig(**{"r": 3, "alpha": 6, "density": 0.1, **fields}),
}
methods = pytest.mark.parametrize("method", CONFIGS)


def adapted(method, base):
    return get_peft_model(base, CONFIGS[method](target_modules=NAMES, init_weights=False))


@methods
@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_and_unmerge_to_the_bit(method, dtype, conv1d):
    base = TwoLayers(conv1d=conv1d).to(dtype)
    model, x = adapted(method, copy.deepcopy(base)), torch.randn(4, 17, dtype=dtype)
    before = model(x)
    model.merge_adapter(safe_merge=True)
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    assert_close(model(x), before, rtol=tolerance, atol=tolerance * before.abs().max().item())
    model.unmerge_adapter()
    assert not any("base_layer" in name and p.requires_grad for name, p in model.named_parameters())
    for layer in (module for module in model.modules() if isinstance(module, TunerLayer)):
        layer.release()
        assert torch.equal(layer.base_layer.weight, base.get_submodule(layer.name).weight)
    assert torch.equal(model(x), before)
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))


@methods
def test_mixed_batches(method):
    model = adapted(method, TwoLayers())
    model.add_adapter("other", CONFIGS[method](target_modules=NAMES[:1], r=2, init_weights=False))
    model.eval()
    x, names = torch.randn(4, 17), ["default", "__base__", "other", "default"]
    got = model(x, adapter_names=names)
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                want = model(x[row])
        else:
            model.set_adapter(name)
            want = model(x[row])
        assert_close(got[row], want, rtol=1e-5, atol=1e-4)
