"""SketchTune on bitsandbytes bases: 4-bit codes are the indices, others are dequantised once to find some."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from benchmarks.measure import LargestTensor
from sparse_peft import SketchConfig, panel_limit
from sparse_peft.ops import unpack_codes
from sparse_peft.tuners.base_layer import TunerLayer
from sparse_peft.tuners.four_bit import FourBit
from tests.helpers.quantized import build, four_bit_layer

bnb = pytest.importorskip("bitsandbytes")


def adapted(kind, model=None, **config):
    config = {"groups": 2, "init_weights": False, **config}
    model = build(kind) if model is None else model
    return get_peft_model(model, SketchConfig(target_modules=["first", "second"], **config))


def layers(model):
    return {m.name: m for m in model.modules() if isinstance(m, TunerLayer)}


def weights(model):
    """The effective weights in float64, requiring grad."""
    return {
        name: (layer.dequantised().double() + layer.get_delta_weight("default").double()).requires_grad_()
        for name, layer in layers(model).items()
    }


def dense_output(model, dense, x):
    first, _second = (layer.get_base_layer() for layer in layers(model).values())
    return torch.relu(x @ dense["first"].t() + first.bias.double()) @ dense["second"].t()


def test_a_new_adapter_is_the_4_bit_base_to_the_bit():
    base = build("4bit")
    x = torch.randn(5, 128)
    want = base(x)
    assert torch.equal(adapted("4bit", base, init_weights=True)(x), want)


def test_nothing_is_stored_besides_the_tables(tmp_path):
    model = adapted("4bit")
    for layer in layers(model).values():
        state = layer.deltas["default"]
        assert state.packed is None and state.initial.numel() == 0
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.nbytes for t in tensors.values()) == 4 * (64 + 32) * 2 * 16 + 2 * 16


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_output_and_gradients(kind):
    torch.manual_seed(0)
    model = adapted(kind)
    assert layers(model)["first"].path() == ("decoded" if kind == "4bit" else "additive")
    x = torch.randn(2, 3, 128, requires_grad=True)
    out = model(x)
    dense, xd = weights(model), x.detach().double().requires_grad_()
    want = dense_output(model, dense, xd)
    scale = want.abs().max().item()
    assert (out.double() - want).abs().max().item() < (2e-2 if kind == "8bit" else 1e-5) * scale
    up = torch.randn_like(out)
    out.backward(up)
    want.backward(up.double())
    for name, layer in layers(model).items():
        state, sketch = layer.deltas["default"], layer.sketch("default")
        # the delta is linear in the tables: their gradient is the dense one's product with its derivative
        table = torch.zeros_like(state.codebook).double().requires_grad_()
        codes = unpack_codes(sketch.codes, 4, sketch.cols).long()
        group = torch.arange(sketch.cols) * 2 // sketch.cols
        delta = table[torch.arange(len(codes))[:, None], group, codes]
        if kind == "4bit":
            maxima = torch.ones(len(codes), sketch.cols)
            FourBit.of(layer.get_base_layer()).scale_(maxima, 0)
            delta = delta * maxima.double()
        (expected,) = torch.autograd.grad(delta, [table], dense[name].grad)
        tolerance = (5e-2 if kind == "8bit" else 1e-4) * expected.abs().max().item()
        torch.testing.assert_close(state.codebook.grad.double(), expected, rtol=1e-2, atol=tolerance)
    if kind == "4bit":
        torch.testing.assert_close(x.grad.double(), xd.grad, rtol=1e-3, atol=1e-4 * xd.grad.abs().max().item())


def test_other_bits_on_a_4_bit_base_find_codes_of_their_own():
    model = adapted("4bit", bits=2)
    assert layers(model)["first"].path() == "additive"
    assert layers(model)["first"].deltas["default"].packed.shape == (64, 32)
    assert model(torch.randn(2, 128)).isfinite().all()


def test_two_adapters_of_other_groups_add_up():
    torch.manual_seed(0)
    model = adapted("4bit")
    model.add_adapter("other", SketchConfig(target_modules=["first", "second"], groups=3, init_weights=False))
    x = torch.randn(3, 128)
    model.base_model.set_adapter(["default", "other"])
    got = model(x)
    dense = weights(model)
    with torch.no_grad():
        for name, layer in layers(model).items():
            dense[name] += layer.get_delta_weight("other").double()
    want = dense_output(model, dense, x.double())
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4 * want.abs().max().item())
    model.eval()
    mixed = model(x, adapter_names=["default", "__base__", "other"])
    with model.disable_adapter():
        torch.testing.assert_close(mixed[1], model(x[1:2])[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_merge_rounds_and_unmerge_gives_every_bit_back(kind):
    model = adapted(kind).eval()
    x = torch.randn(3, 128)
    with torch.no_grad():
        before = model(x)
        with pytest.warns(UserWarning, match="rounds the merged weight"):
            model.merge_adapter()
        assert not torch.equal(model(x), before)
        model.unmerge_adapter()
        assert torch.equal(model(x), before)


def test_files_belong_to_the_base_they_were_made_on(tmp_path):
    torch.manual_seed(0)
    model = adapted("4bit")
    model.save_pretrained(tmp_path / "4bit")
    x = torch.randn(3, 128)
    again = PeftModel.from_pretrained(build("4bit"), tmp_path / "4bit")
    assert torch.equal(again(x), model(x))
    with pytest.raises(ValueError, match="layer first: the adapter was made for bitsandbytes' 4-bit codes"):
        PeftModel.from_pretrained(build("8bit"), tmp_path / "4bit")
    adapted("8bit").save_pretrained(tmp_path / "8bit")
    with pytest.raises(ValueError, match="layer first: the adapter was made for codes of its own"):
        PeftModel.from_pretrained(build("4bit"), tmp_path / "8bit")
    other = build("4bit")
    other.second.weight.data[0] ^= 0x11
    with pytest.raises(ValueError, match="layer second: the codes of this model's weights"):
        PeftModel.from_pretrained(other, tmp_path / "4bit")


def test_no_dense_weight_in_a_step():
    layer = torch.nn.Sequential()
    layer.add_module("first", four_bit_layer(512, 256, 64))
    model = get_peft_model(layer, SketchConfig(target_modules=["first"], init_weights=False))
    x = torch.randn(4, 256, requires_grad=True)
    with panel_limit(32 * 1024), LargestTensor() as largest:
        model(x).sum().backward()
    assert 0 < largest.nbytes <= 512 * 256 // 2 < 512 * 256 * 4


def test_a_cast_behind_our_back_is_undone():
    model = adapted("4bit").train()
    for layer in layers(model).values():  # as TRL does where the base is quantised
        state = layer.deltas["default"]
        state.codebook.data = state.codebook.data.to(torch.bfloat16)
    with pytest.warns(UserWarning, match="codebook of the adapter.*cast back"):
        model(torch.randn(2, 128))
    assert all(layer.deltas["default"].codebook.dtype == torch.float32 for layer in layers(model).values())


def test_a_quantised_base_is_not_replaced():
    with pytest.raises(TypeError, match=r"first of type Linear4bit: mode='replace'.*use mode='delta'"):
        adapted("4bit", mode="replace")


def test_copies_follow():
    model = adapted("4bit")
    x = torch.randn(2, 128)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
