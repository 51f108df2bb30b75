"""S2FT on bitsandbytes bases: the dense reference, what is saved, merging."""

import pytest
import torch
from peft import get_peft_model

from sparse_peft import S2FTConfig
from tests.helpers.memory import saved_bytes
from tests.helpers.quantized import build, check_against_the_dense_reference

pytest.importorskip("bitsandbytes")


def adapted(kind, side, **config):
    config = {"k": 5, "init_weights": False, **config}
    return get_peft_model(build(kind), S2FTConfig(target_modules=["first", "second"], side=side, **config))


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
@pytest.mark.parametrize("side", ["in", "out"])
def test_forward_and_gradients_equal_the_dense_reference(kind, side):
    check_against_the_dense_reference(adapted(kind, side), atol=1e-3)


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_only_the_trained_inputs_are_saved(kind):
    layer = adapted(kind, "in").base_model.model.first
    x = torch.randn(6, 128, requires_grad=True)
    packed = [t for t in (layer.get_base_layer().weight,) if isinstance(t, torch.Tensor)]
    nbytes, y = saved_bytes(layer, x.mul(1))
    assert nbytes <= 6 * 5 * 4 + sum(t.nbytes for t in packed)
    y.sum().backward()


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_mixed_batches_merging_and_unmerging(kind):
    model = adapted(kind, "in")
    model.add_adapter("other", S2FTConfig(k=3, seed=1, target_modules=["first"], side="in", init_weights=False))
    model.eval()
    x = torch.randn(3, 128)
    with torch.no_grad():
        mixed = model(x, adapter_names=["other", "default", "__base__"])
        for i, name in enumerate(["other", "default"]):
            model.set_adapter(name)
            torch.testing.assert_close(mixed[i], model(x)[i], rtol=1e-2, atol=1e-2)
        with model.disable_adapter():
            base = model(x)
        torch.testing.assert_close(mixed[2], base[2], rtol=1e-3, atol=1e-3)
        model.set_adapter("default")
        with pytest.warns(UserWarning, match="rounds"):
            model.merge_adapter()
        model.unmerge_adapter()
        with model.disable_adapter():
            assert torch.equal(model(x), base)
