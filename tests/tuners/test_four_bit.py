"""bitsandbytes' 4-bit weights, against numbers from codes, table and maxima by hand; also where it misreads them."""

import warnings

import pytest
import torch
from peft import get_peft_model
from torch import nn

from sparse_peft import SketchConfig, SoRAConfig, SparseConfig, panel_limit, select_support, sketch_model
from sparse_peft.ops import code_gather
from sparse_peft.tuners import four_bit
from sparse_peft.tuners.four_bit import FourBit
from sparse_peft.tuners.targets import dense_weight
from tests.helpers.quantized import build, four_bit_layer

bnb = pytest.importorskip("bitsandbytes")
SHAPES = [(8, 128, 64), (6, 96, 64), (5, 34, 64), (3, 64, 128), (7, 48, 256)]
TARGETS = ["first", "second"]


def by_hand(layer):
    """The weight in float32: a table's entry for each half byte, times the maximum of its block."""
    state = layer.weight.quant_state
    maxima = state.absmax
    if state.nested:
        second = state.state2
        scales = second.absmax.repeat_interleave(second.blocksize)[: maxima.numel()]
        maxima = second.code[maxima.long()] * scales + state.offset
    packed = layer.weight.data.reshape(-1).long()
    codes = torch.stack([packed >> 4, packed & 15], 1).reshape(-1)
    return (state.code[codes] * maxima.repeat_interleave(state.blocksize)[: codes.numel()]).view(state.shape)


def repacked(kind="4bit"):
    """A base after what bitsandbytes does at a pass in evaluation mode on a CPU with AVX512-BF16."""
    if not hasattr(bnb.functional, "_convert_weight_packed_for_cpu"):
        pytest.skip(f"bitsandbytes {bnb.__version__} repacks nothing")
    model = build(kind).eval()
    for layer in (model.first, model.second):
        layer.weight.data, state = bnb.functional._convert_weight_packed_for_cpu(
            layer.weight.data, layer.weight.quant_state
        )
        layer.weight.quant_state = layer.quant_state = state
    return model


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("rows, cols, block", SHAPES)
def test_weights_are_entries_of_the_table_times_maxima(quant_type, nested, rows, cols, block):
    """Also where a block of weights that share a maximum ends within a row."""
    torch.manual_seed(0)
    layer = four_bit_layer(rows, cols, block, quant_type, nested)
    found, want = FourBit.of(layer), by_hand(layer)
    for start, stop in ((0, rows), (1, rows)):
        table = found.table.expand(stop - start, 1, 16)
        got = code_gather(table, found.codes[start:stop], 4, cols, torch.float32).contiguous()
        found.scale_(got, start)
        torch.testing.assert_close(got, want[start:stop], rtol=1e-6, atol=0)
    assert found.codes.untyped_storage().data_ptr() == layer.weight.data.untyped_storage().data_ptr()
    with panel_limit(2 * 4 * cols):
        torch.testing.assert_close(found.dense(), want, rtol=1e-6, atol=0)


def test_odd_rows_have_no_codes_of_their_own():
    assert FourBit.of(four_bit_layer(4, 33, 64)) is None
    assert FourBit.of(nn.Linear(3, 4)) is None and FourBit.of(build("8bit").first) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows, cols, block", [*SHAPES, (4, 33, 64)])
def test_weights_are_read_right_on_every_cpu(rows, cols, block, dtype):
    torch.manual_seed(0)
    layer = four_bit_layer(rows, cols, block, dtype=dtype)
    got = dense_weight(layer)
    assert got.dtype == dtype
    torch.testing.assert_close(got, by_hand(layer).to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("rows, cols, block", SHAPES)
def test_what_bitsandbytes_misreads_is_found_out(rows, cols, block):
    torch.manual_seed(0)
    layer = four_bit_layer(rows, cols, block)
    theirs = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert four_bit.is_misread(layer) != torch.allclose(theirs, by_hand(layer))


@pytest.mark.parametrize("misread", [True, False])
def test_an_adapter_on_a_misread_layer_warns_and_multiplies_by_the_right_weight(misread, monkeypatch):
    monkeypatch.setattr(four_bit, "_misreads", lambda *of_layer: misread)
    torch.manual_seed(0)
    model = nn.Sequential(four_bit_layer(6, 96 if misread else 128, 64))
    config = SparseConfig(target_modules=["0"], density=0.1, init_weights=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = get_peft_model(model, config)
    said = [str(w.message) for w in caught if "bitsandbytes reads" in str(w.message)]
    assert len(said) == misread and all(
        "1 layers wrong on this CPU, such as one of 96 inputs" in text for text in said
    )
    layer = model.base_model.model[0]
    weight = by_hand(layer.base_layer) + layer.get_delta_weight("default")
    x = torch.randn(5, layer.in_features)
    torch.testing.assert_close(model(x), x @ weight.t())


def test_an_adapter_on_a_repacked_base_warns_and_unpacks_it():
    x = torch.randn(3, 128)
    fresh, base = build("4bit"), repacked()
    with pytest.warns(UserWarning, match="repacked the 4-bit weights of 2 layers.*before the first pass"):
        model = get_peft_model(base, SparseConfig(target_modules=["first"], density=0.1))
    for mine, other in ((base.first.base_layer, fresh.first), (base.second, fresh.second)):
        assert torch.equal(mine.weight.data, other.weight.data)
        torch.testing.assert_close(by_hand(mine), by_hand(other), rtol=0.05, atol=1e-3)
    torch.testing.assert_close(model(x), fresh(x), rtol=0.05, atol=0.02)


def test_layers_without_an_adapter_are_not_repacked_either():
    """Their products would have no gradient afterwards."""
    model = get_peft_model(build("4bit"), SoRAConfig(r=4, target_modules=["first"]))
    x = torch.randn(3, 128)

    def gradients():
        model.zero_grad()
        model.train()
        model(x).square().sum().backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    before = gradients()
    model.eval()
    with torch.no_grad():
        model(x)
    assert all(torch.equal(a, b) for a, b in zip(before, gradients(), strict=True))


@pytest.mark.parametrize("selection", ["wanda", "gradient"])
def test_positions_chosen_from_data_do_not_depend_on_the_mode(selection):
    config = SparseConfig(selection=selection, density=0.05, target_modules=TARGETS)

    def chosen(model):
        batches = [{"x": torch.ones(1, 128).cumsum(1)}]
        found = select_support(model, config, batches, loss_fn=lambda m, batch: m(batch["x"]).square().sum())
        return {name: support.indices.tolist() for name, support in found.supports.items()}

    assert chosen(build("4bit").eval()) == chosen(build("4bit").train())


def test_sketches_from_data_do_not_depend_on_the_mode():
    def sketches(model):
        config = SketchConfig(bits=2, target_modules=TARGETS)
        data = [{"x": torch.randn(200, 128, generator=torch.Generator().manual_seed(0))}]
        return sketch_model(model, config, data, loss_fn=lambda m, batch: m(batch["x"])).sketches

    trained, evaluated = sketches(build("4bit").train()), sketches(build("4bit").eval())
    assert all(torch.equal(trained[name].codes, evaluated[name].codes) for name in trained)
