"""SketchTune's tuner; numbers of oracles are those of the method's specification, section 2h."""

import copy
import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load, load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.pytorch_utils import Conv1D

from benchmarks.measure import LargestTensor
from sparse_peft import SketchConfig, panel_limit
from sparse_peft.calibrate import Sketch, assign_codes, fit_codebooks
from sparse_peft.ops import pack_codes, unpack_codes
from sparse_peft.tuners.delta_layer import TunerLayer
from sparse_peft.tuners.sketch.sketched import SketchedLinear
from tests.helpers.two_layers import TwoLayers
from tests.helpers.versions import transformers_adapters

NAMES = ["first", "second"]
MODES = ["delta", "replace"]
STORAGES = ["recompute", "sidecar", "embed"]


def sketched(model=None, random=True, adapter_name="default", **config):
    config = SketchConfig(**{"target_modules": NAMES, "bits": 3, "groups": 2, "init_weights": not random, **config})
    return get_peft_model(TwoLayers() if model is None else model, config, adapter_name)


def layers(model):
    return {m.name: m for m in model.modules() if isinstance(m, TunerLayer)}


def by_index(layer, table, adapter="default"):
    """``table[code]`` of every weight, as stored, in float64, from the packed codes."""
    sketch = layer.sketch(adapter)
    codes = unpack_codes(sketch.codes, sketch.bits, sketch.cols).long()
    group = torch.arange(sketch.cols) * sketch.groups // sketch.cols
    dense = table.detach().double()[torch.arange(len(codes))[:, None], group, codes]
    return dense if layer.product.in_dim == 1 else dense.t()


def with_weights(base, model, names=("default",)):
    """A copy of the base in float64 that has the adapters' weights, written from the method's definition."""
    twin = copy.deepcopy(base).double()
    for name, layer in layers(model).items():
        weight = getattr(twin, name).weight.data
        initial = layer.sketch(names[0]).codebooks
        if layer.replaced is not None:
            weight.copy_(by_index(layer, initial))
        for adapter in names:
            table = layer.deltas[adapter].codebook.detach()
            weight += by_index(layer, table - initial if layer.replaced is not None else table, adapter)
    return twin


def move(model, scale=0.1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


# ---------------------------------------------------------------------------------------------------- output


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("bits, groups", [(2, 1), (3, 2), (4, 3)])
def test_output_and_gradients_are_those_of_the_dense_weight(mode, conv1d, bits, groups):
    torch.manual_seed(0)
    base = TwoLayers(conv1d=conv1d)
    model = sketched(copy.deepcopy(base), mode=mode, bits=bits, groups=groups)
    twin = with_weights(base, model)
    for shape in ((17,), (4, 17), (2, 3, 17), (0, 17)):
        x = torch.randn(*shape)
        torch.testing.assert_close(model(x).double(), twin(x.double()), rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            torch.testing.assert_close(model(x).double(), twin(x.double()), rtol=1e-4, atol=1e-4)
    x = torch.randn(4, 17, requires_grad=True)
    xd = x.detach().double().requires_grad_()
    twin.requires_grad_()
    model(x).square().sum().backward()
    twin(xd).square().sum().backward()
    torch.testing.assert_close(x.grad.double(), xd.grad, rtol=1e-3, atol=1e-3)
    for name, layer in layers(model).items():
        dense = getattr(twin, name).weight.grad
        dense = dense if layer.product.in_dim == 1 else dense.t()
        sketch = layer.sketch("default")
        places = unpack_codes(sketch.codes, bits, sketch.cols).long()
        places += torch.arange(sketch.cols) * groups // sketch.cols * (1 << bits)
        want = torch.zeros(len(dense), groups << bits, dtype=torch.float64).scatter_add_(1, places, dense)
        got = layer.deltas["default"].codebook.grad.flatten(1).double()
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * want.abs().max().item())


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_oracle_13_a_new_delta_is_the_base_to_the_bit(conv1d, dtype):
    base = TwoLayers(conv1d=conv1d).to(dtype)
    x = torch.randn(4, 17, dtype=dtype)
    assert torch.equal(sketched(copy.deepcopy(base), random=False)(x), base(x))


def test_oracle_1_rows_of_few_values_are_replaced_bit_for_bit():
    torch.manual_seed(0)
    base = TwoLayers(bias=False)
    for name in NAMES:  # at most 4 values a row, each row its own
        rows, cols = getattr(base, name).weight.shape
        table = torch.randn(rows, 4)
        getattr(base, name).weight.data = table.gather(1, torch.randint(0, 4, (rows, cols)))
    model = sketched(copy.deepcopy(base), mode="replace", bits=2, groups=1, random=False)
    for name, layer in layers(model).items():
        assert torch.equal(layer.base_layer.weight, getattr(base, name).weight)
    x = torch.randn(4, 17)
    assert torch.equal(model(x), base(x))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codes_take_their_bits_and_no_more(bits):
    model = sketched(TwoLayers(n_in=19), mode="replace", bits=bits, groups=1)
    layer = layers(model)["first"]
    assert tuple(layer.base_layer.codes.shape) == (33, -(-19 * bits // 8))
    weights = [p for p in model.parameters() if p.is_floating_point() and p.ndim == 2]
    assert not weights  # no dense weight is left


def test_oracle_15_biases_are_kept():
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    base = Qwen2ForCausalLM(config)
    for module in base.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.normal_(module.bias)
    model = get_peft_model(copy.deepcopy(base), SketchConfig(mode="replace", target_modules="all-linear"))
    found = {name: layer.base_layer.bias for name, layer in layers(model).items()}
    for name, bias in found.items():
        assert (bias is not None) == name.endswith(("q_proj", "k_proj", "v_proj"))
        assert bias is None or torch.equal(bias, base.get_submodule(name).bias)
    dense = copy.deepcopy(base)
    for name, layer in layers(model).items():
        dense.get_submodule(name).weight.data = layer.base_layer.weight
    ids = torch.arange(8)[None]
    torch.testing.assert_close(model(input_ids=ids).logits, dense(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_oracle_16_disabled_adapters(mode):
    """A delta leaves the base to the bit; what was replaced is the first sketch."""
    torch.manual_seed(0)
    base = TwoLayers()
    model = sketched(copy.deepcopy(base), mode=mode)
    want = copy.deepcopy(base)
    if mode == "replace":
        for name, layer in layers(model).items():
            getattr(want, name).weight.data = by_index(layer, layer.sketch("default").codebooks).float()
    x = torch.randn(4, 17)
    with model.disable_adapter():
        assert torch.equal(model(x), want(x))
    assert not torch.allclose(model(x), want(x), atol=1e-2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_oracle_13_merged_is_unmerged_to_the_bit_and_back(mode, dtype):
    torch.manual_seed(0)
    base = TwoLayers().to(dtype)
    model = sketched(copy.deepcopy(base), mode=mode)
    x = torch.randn(4, 17, dtype=dtype)
    before = model(x)
    assert before.dtype == dtype
    model.merge_adapter(safe_merge=True)
    assert torch.equal(model(x), before)
    model.unmerge_adapter()
    assert torch.equal(model(x), before)
    if mode == "delta":
        for name, layer in layers(model).items():
            assert torch.equal(layer.base_layer.weight, getattr(base, name).weight)
    dense = model.merge_and_unload()
    assert type(dense.first) is nn.Linear and torch.equal(dense(x), before)
    assert set(dense.state_dict()) == set(base.state_dict())


def test_merged_conv1d_stays_one():
    model = sketched(TwoLayers(conv1d=True), mode="replace")
    x = torch.randn(4, 17)
    before = model(x)
    dense = model.merge_and_unload()
    assert type(dense.first) is Conv1D and torch.allclose(dense(x), before, atol=1e-5)


def test_a_broken_table_is_not_merged():
    for mode in MODES:
        model = sketched(mode=mode)
        with torch.no_grad():
            layers(model)["second"].deltas["default"].codebook[0, 0, 0] = float("nan")
        with pytest.raises(ValueError, match=r"layer second.*not finite"):
            model.merge_adapter(safe_merge=True)


# ---------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("conv1d", [False, True])
def test_oracle_14_nothing_of_a_weights_size_in_a_step(mode, conv1d):
    limit = 32 * 1024
    model = sketched(TwoLayers(256, 1024, 256, conv1d=conv1d), mode=mode, clustering="uniform", groups=1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for batch in (1, 4):
        x = torch.randn(batch, 2, 256, requires_grad=True)
        with panel_limit(limit), LargestTensor() as largest:
            model(x).sum().backward()
        optimizer.step()
        tables = 1024 * 8 * 4
        assert 0 < largest.nbytes <= max(limit, tables) < 1024 * 256


def test_oracle_12_a_small_learning_rate_moves_every_table_entry():
    """In bfloat16, which the authors train in, most entries of the same tables stay where they are."""
    torch.manual_seed(0)
    base = TwoLayers(64, 64, 64, bias=False).to(torch.bfloat16)
    model = sketched(base, mode="replace", groups=1, bits=4, random=False)
    ours = [layer.deltas["default"].codebook for layer in layers(model).values()]
    assert all(table.dtype == torch.float32 for table in ours)
    theirs = [table.detach().to(torch.bfloat16).requires_grad_() for table in ours]
    started = [[t.detach().clone() for t in tables] for tables in (ours, theirs)]
    optimizers = [torch.optim.AdamW(tables, lr=1e-5, weight_decay=0) for tables in (ours, theirs)]
    for _ in range(20):
        model(torch.randn(8, 64, dtype=torch.bfloat16)).float().square().sum().backward()
        for mine, other in zip(ours, theirs, strict=True):
            other.grad = mine.grad.to(torch.bfloat16)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    moved = [
        torch.cat([(t != s).flatten()[s.abs().flatten() > 0.02] for t, s in zip(tables, before, strict=True)])
        .float()
        .mean()
        for tables, before in zip((ours, theirs), started, strict=True)
    ]
    assert moved[0] > 0.95 and moved[1] < 0.05


@pytest.mark.parametrize("cast", ["half", "bfloat16"])
def test_casting_the_model_rounds_no_table(cast):
    model = sketched(mode="replace", random=False)
    before = {name: (layer.deltas["default"].codebook.clone(), layer.base_layer.codebook.clone()) for name, layer in
              layers(model).items()}  # fmt: skip
    getattr(model, cast)()
    for name, layer in layers(model).items():
        assert torch.equal(layer.deltas["default"].codebook, before[name][0])
        assert torch.equal(layer.base_layer.codebook, before[name][1])
        assert layer.base_layer.weight.dtype == layer.base_layer.bias.dtype if name == "first" else True
    model(torch.randn(2, 17).to(layers(model)["first"].base_layer.dtype)).sum().backward()


@pytest.mark.parametrize("mode", MODES)
def test_autocast_and_checkpointing(mode):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    base = LlamaForCausalLM(config)
    ids = torch.arange(12)[None]
    found = []
    for checkpointing in (None, False, True):
        torch.manual_seed(1)
        model = get_peft_model(
            copy.deepcopy(base), SketchConfig(mode=mode, target_modules="all-linear", init_weights=mode == "replace")
        )
        move(model)
        if checkpointing is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(input_ids=ids)
    out.logits.float().sum().backward()
    assert out.logits.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("mode", MODES)
def test_compiled_models_compute_the_same(mode):
    model = sketched(mode=mode)
    x = torch.randn(3, 17)
    results = []
    for called in (model, torch.compile(model, backend="eager")):
        out = called(x)
        model.zero_grad()
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    torch._dynamo.reset()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_a_hooked_base_layer_keeps_its_hooks(mode):
    model = sketched(mode=mode)
    x = torch.randn(3, 17)
    before, called = model(x), []
    layer = layers(model)["first"]
    layer.base_layer.register_forward_hook(lambda *_: called.append(1))
    assert layer.path(x) == "additive"
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    assert called


# ---------------------------------------------------------------------------------------------------- several adapters


@pytest.mark.parametrize("mode", MODES)
def test_active_together_they_add_up_and_in_a_batch_each_has_its_own(mode):
    torch.manual_seed(0)
    base = TwoLayers()
    model = sketched(copy.deepcopy(base), mode=mode)
    other = {"bits": 2} if mode == "delta" else {"bits": 3, "groups": 2}
    model.add_adapter("other", SketchConfig(mode=mode, target_modules=NAMES[:1], init_weights=False, **other))
    model.eval()
    x = torch.randn(3, 17)
    want = {"default": with_weights(base, model)}
    twin = copy.deepcopy(base).double()
    first, second = layers(model)["first"], layers(model)["second"]
    if mode == "replace":
        twin.second.weight.data = by_index(second, second.base_layer.codebook)
        twin.first.weight.data = by_index(first, first.deltas["other"].codebook, "other")
    else:
        twin.first.weight.data += by_index(first, first.deltas["other"].codebook, "other")
    want["other"] = twin
    got = model(x, adapter_names=["other", "__base__", "default"])
    torch.testing.assert_close(got[0].double(), want["other"](x[0].double()), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got[2].double(), want["default"](x[2].double()), rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        torch.testing.assert_close(got[1], model(x[1]), rtol=1e-4, atol=1e-5)
    model.base_model.set_adapter(["default", "other"])
    both = copy.deepcopy(want["default"])
    table = first.deltas["other"].codebook.detach()
    initial = first.sketch("other").codebooks if mode == "replace" else 0
    both.first.weight.data += by_index(first, table - initial, "other")
    torch.testing.assert_close(model(x).double(), both(x.double()), rtol=1e-4, atol=1e-4)
    model.merge_adapter()
    torch.testing.assert_close(model(x).double(), both(x.double()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_oracle_13_weighted_sums_are_exact(mode):
    torch.manual_seed(0)
    model = sketched(mode=mode)
    for name in ("other", "third"):
        model.add_adapter(name, SketchConfig(mode=mode, target_modules=NAMES, bits=3, groups=2, init_weights=False))
    model.add_weighted_adapter(["default", "other", "third"], [0.5, -2.0, 1.0], "sum")
    for layer in layers(model).values():
        parts = [layer.get_delta_weight(name).double() for name in ("default", "other", "third")]
        want = 0.5 * parts[0] - 2 * parts[1] + parts[2]
        torch.testing.assert_close(layer.get_delta_weight("sum").double(), want, rtol=1e-5, atol=1e-6)
    model.set_adapter("sum")
    assert model(torch.randn(2, 17)).isfinite().all()
    with pytest.raises(ValueError, match="no adapter 'none'"):
        model.add_weighted_adapter(["default", "none"], [1, 1], "new")
    with pytest.raises(ValueError, match="combination_type='ties': SketchModel has linear"):
        model.add_weighted_adapter(["default"], [1], "new", combination_type="ties", density=0.5)
    if mode == "delta":
        model.add_adapter("coarse", SketchConfig(target_modules=NAMES, bits=2))
        with pytest.raises(ValueError, match=r"layer first.*'default' and 'coarse' have other codes"):
            model.add_weighted_adapter(["default", "coarse"], [1, 1], "new")
        assert "new" not in model.peft_config


def test_a_weighted_sum_is_saved_and_comes_back(tmp_path):
    torch.manual_seed(0)
    base = TwoLayers()
    model = sketched(copy.deepcopy(base))
    model.add_adapter("other", SketchConfig(target_modules=NAMES, bits=3, groups=2, init_weights=False))
    model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "sum")
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "sum")
    x = torch.randn(3, 17)
    assert torch.equal(again(x), model(x))


def test_adapters_that_replace_share_codes_or_are_refused(tmp_path):
    torch.manual_seed(0)
    base = TwoLayers()
    model = sketched(copy.deepcopy(base), mode="replace")
    model.add_adapter("other", SketchConfig(mode="replace", target_modules=NAMES, bits=3, groups=2))
    layer = layers(model)["first"]
    assert torch.equal(layer.deltas["other"].codebook, layer.base_layer.codebook)
    with pytest.raises(ValueError, match=r"layer first.*bits=3, groups=2 where.*bits=4"):
        model.add_adapter("wider", SketchConfig(mode="replace", target_modules=NAMES, groups=2))
    foreign = sketched(TwoLayers(), mode="replace")
    foreign.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="layer first: the adapter was trained on other codes"):
        sketched(copy.deepcopy(base), mode="replace").load_adapter(tmp_path, "foreign")
    with pytest.raises(ValueError, match="mode='delta': the model has adapters of the other mode"):
        sketched(copy.deepcopy(base), mode="replace").add_adapter("delta", SketchConfig(target_modules=NAMES))


def test_the_same_config_object_again_has_the_same_codes():
    """As TRL adds its reference adapter, whose tables it then copies from the policy's."""
    for mode in MODES:
        model = sketched(mode=mode)
        model.add_adapter("ref", model.peft_config["default"])
        for layer in layers(model).values():
            assert torch.equal(layer.sketch("ref").codes, layer.sketch("default").codes)


# ---------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_oracle_10_a_saved_adapter_comes_back_on_a_fresh_base(mode, storage, low, dtype, tmp_path):
    torch.manual_seed(0)
    base = TwoLayers().to(dtype)
    x = torch.randn(4, 17, dtype=dtype)
    sketches = compensated(base) if storage != "recompute" else None
    config = SketchConfig(mode=mode, target_modules=NAMES, bits=3, groups=2, init_weights=False, index_storage=storage)
    if sketches:
        config.sketches = sketches
    model = get_peft_model(copy.deepcopy(base), config)
    model.save_pretrained(tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    assert ("sketch.safetensors" in files) == (storage == "sidecar")
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=low)
    assert torch.equal(again(x), model(x))
    for name, layer in layers(again).items():
        assert torch.equal(layer.sketch("default").codes, layers(model)[name].sketch("default").codes)
    again.save_pretrained(tmp_path / "twice")
    assert all(
        torch.equal(a, b)
        for a, b in zip(*(
            load_file(folder / "adapter_model.safetensors").values() for folder in (tmp_path, tmp_path / "twice")
        ), strict=True)
    )  # fmt: skip
    for name in NAMES:  # a wrong base, of one layer at a time
        wrong = copy.deepcopy(base)
        getattr(wrong, name).weight.data += 0.1 * torch.randn_like(getattr(wrong, name).weight)
        with pytest.raises(ValueError, match=f"layer {name}: the codes of this model's weights"):
            PeftModel.from_pretrained(wrong, tmp_path)


def compensated(base):
    """Codes that are not those of the nearest entries, as a calibration gives them."""
    found = {}
    for name in NAMES:
        weight = getattr(base, name).weight.detach().float()
        tables = fit_codebooks(weight, 3, 2)
        codes = assign_codes(weight, tables)
        codes = torch.where(torch.rand(codes.shape) < 0.2, (codes + 1).clamp(max=7), codes)
        found[name] = Sketch(tables, pack_codes(codes, 3), bits=3, groups=2, cols=weight.shape[1])
    return found


def test_codes_that_cannot_be_found_again_are_not_recomputed():
    base = TwoLayers()
    config = SketchConfig(target_modules=NAMES, bits=3, groups=2, index_storage="recompute")
    config.sketches = compensated(base)
    with pytest.raises(ValueError, match=r"layer first: index_storage='recompute'.*not the nearest"):
        get_peft_model(base, config)
    config = SketchConfig(target_modules=NAMES, bits=3, groups=2)
    config.sketches = compensated(base)
    get_peft_model(copy.deepcopy(base), config)
    assert config.index_storage == "sidecar"
    config.sketches = {"first": config.sketches["first"]}
    with pytest.raises(ValueError, match=r"the given sketches are for other layers.*second"):
        get_peft_model(copy.deepcopy(base), config)


@pytest.mark.parametrize("mode", MODES)
def test_oracle_9_one_ulp_over_a_midpoint_is_refused(mode, tmp_path):
    torch.manual_seed(0)
    base = TwoLayers().to(torch.bfloat16)
    model = sketched(copy.deepcopy(base), mode=mode)
    model.save_pretrained(tmp_path)
    sketch = layers(model)["second"].sketch("default")
    table, codes = sketch.codebooks, unpack_codes(sketch.codes, 3, sketch.cols)
    assert table.dtype == torch.float32
    wrong = copy.deepcopy(base)
    row = wrong.second.weight.data[0]
    middle = (table[0, 0, :-1] + table[0, 0, 1:]) / 2
    inside, which = (row[:16].float()[:, None] - middle).abs().min(1)
    column = int(inside.argmin())  # the weight that is nearest to a midpoint, moved towards it bit by bit
    bits, step = row.view(torch.int16), 1 if (row[column] < middle[which[column]]) == (row[column] > 0) else -1
    for _ in range(2000):
        bits[column] += step
        if assign_codes(wrong.second.weight.data.float(), table)[0, column] != codes[0, column]:
            break
    else:
        pytest.fail("the weight never crossed the midpoint")
    bits[column] -= step  # the last value on this side of it has the adapter's codes ...
    PeftModel.from_pretrained(copy.deepcopy(wrong), tmp_path)
    bits[column] += step  # ... and one unit in the last place further has others
    with pytest.raises(ValueError, match=r"layer second.*checksums differ"):
        PeftModel.from_pretrained(wrong, tmp_path)


def test_a_cast_base_says_which_dtype_it_was(tmp_path):
    torch.manual_seed(0)
    base = TwoLayers(256, 256, 256)
    sketched(copy.deepcopy(base)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"layer first.*\(bfloat16\).*on float32"):
        PeftModel.from_pretrained(copy.deepcopy(base).to(torch.bfloat16), tmp_path)


@pytest.mark.parametrize("mode, initial", [("delta", 2), ("replace", 4)])
@pytest.mark.parametrize("save_dtype, width", [("float32", 4), ("bfloat16", 2)])
def test_oracle_11_bytes_of_a_saved_adapter(mode, initial, save_dtype, width, tmp_path):
    model = sketched(TwoLayers(512, 256, 512), mode=mode, save_dtype=save_dtype, clustering="uniform")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    entries = (256 + 512) * 2 * 8
    assert sum(t.nbytes for t in tensors.values()) == (width + initial) * entries + 2 * 16
    codes = sum(layer.sketch("default").codes.nbytes for layer in layers(model).values())
    assert codes == 2 * 256 * 512 * 3 // 8
    model.peft_config["default"].index_storage = None
    embedded = sketched(TwoLayers(512, 256, 512), mode=mode, save_dtype=save_dtype, index_storage="embed")
    embedded.save_pretrained(tmp_path / "embed")
    whole = load_file(tmp_path / "embed" / "adapter_model.safetensors")
    assert sum(t.nbytes for t in whole.values()) == (width + initial) * entries + 2 * 16 + codes


def test_a_side_file_is_shared_checked_and_never_overwritten(tmp_path):
    torch.manual_seed(0)
    base = TwoLayers()
    path = tmp_path / "shared.safetensors"
    x = torch.randn(2, 17)
    outputs, written = {}, []
    for name in ("one", "two"):
        config = SketchConfig(target_modules=NAMES, bits=3, groups=2, init_weights=False, sketch=str(path))
        if name == "one":
            config.sketches = compensated(base)
        model = get_peft_model(copy.deepcopy(base), config)
        model.save_pretrained(tmp_path / name)
        outputs[name] = model(x)
        assert not (tmp_path / name / "sketch.safetensors").exists()
        written.append(path.stat().st_mtime_ns)
    assert written[0] == written[1]
    for name, want in outputs.items():
        assert torch.equal(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / name)(x), want)
    with path.open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(ValueError, match=r"shared\.safetensors: SHA-256 .* trained with"):
        PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "one")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"shared\.safetensors.*should be in this file"):
        PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "one")


def test_damaged_files_name_the_layer(tmp_path):
    torch.manual_seed(0)
    base = TwoLayers()
    sketched(copy.deepcopy(base)).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load(path.read_bytes())  # no views of the file, which is written over
    (key,) = [key for key in tensors if "first" in key and key.endswith("initial")]
    save_file({k: v for k, v in tensors.items() if k != key}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"layer first.*4-bit codes"):
        PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    save_file({**tensors, key: tensors[key][:, :1].contiguous()}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"layer first: initial is torch\.uint8 of shape"):
        PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)


@transformers_adapters
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("storage", ["recompute", "embed"])
def test_transformers_loads_it_too(mode, storage, tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    base = LlamaForCausalLM(config).eval()
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(
        copy.deepcopy(base), SketchConfig(mode=mode, target_modules=["q_proj", "up_proj"], index_storage=storage)
    )
    move(model).eval()
    model.save_pretrained(tmp_path / "adapter")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again.load_adapter(str(tmp_path / "adapter"))
    ids = torch.arange(8)[None]
    assert torch.equal(again.eval()(input_ids=ids).logits, model(input_ids=ids).logits)
    wrong = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    wrong.model.layers[0].mlp.up_proj.weight.data += 0.1
    with pytest.raises(ValueError, match=r"layer model\.layers\.0\.mlp\.up_proj.*checksums differ"):
        wrong.load_adapter(str(tmp_path / "adapter"))
        wrong(input_ids=ids)  # transformers 5 reads files by itself
    new = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    new.add_adapter(SketchConfig(mode=mode, target_modules=["q_proj", "up_proj"]))
    assert new(input_ids=ids).logits.isfinite().all()


def test_nothing_is_clustered_while_loading(tmp_path, monkeypatch):
    base = TwoLayers()
    sketched(copy.deepcopy(base)).save_pretrained(tmp_path)
    monkeypatch.setattr("sparse_peft.tuners.sketch.state.fit_codebooks", lambda *a, **k: pytest.fail("clustered"))
    PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_dtype"] == "float32" and config["index_storage"] == "recompute"


# ---------------------------------------------------------------------------------------------------- leaving


def test_unloading_gives_the_kept_weight_back_or_says_why_not():
    torch.manual_seed(0)
    base = TwoLayers()
    model = sketched(copy.deepcopy(base), mode="replace", keep_base="cpu")
    back = model.unload()
    assert type(back.first) is nn.Linear and torch.equal(back.first.weight, base.first.weight)
    model = sketched(copy.deepcopy(base), mode="replace")
    with pytest.raises(RuntimeError, match=r"layer first: its dense weight was dropped.*merge_and_unload"):
        model.unload()
    assert isinstance(layers(model)["first"].base_layer, SketchedLinear)  # and nothing was touched
    assert torch.equal(sketched(copy.deepcopy(base)).unload().first.weight, base.first.weight)


def test_copies_and_deleted_adapters():
    for mode in MODES:
        model = sketched(mode=mode)
        x = torch.randn(2, 17)
        twin = copy.deepcopy(model)
        assert torch.equal(twin(x), model(x))
        move(twin)
        assert not torch.equal(twin(x), model(x))
        model.add_adapter("other", SketchConfig(mode=mode, target_modules=NAMES, bits=3, groups=2))
        model.delete_adapter("default")
        model.set_adapter("other")
        assert model(x).isfinite().all()


def test_what_cannot_be_done_says_why():
    with pytest.raises(ValueError, match="bits=5: one of 2, 3, 4"):
        SketchConfig(bits=5)
    with pytest.raises(ValueError, match="mode='both'"):
        SketchConfig(mode="both")
    with pytest.raises(ValueError, match="clustering='median'"):
        SketchConfig(clustering="median")
    with pytest.raises(TypeError, match=r"groups=1\.5"):
        SketchConfig(groups=1.5)
    with pytest.raises(ValueError, match=r"groups_pattern\['q_proj'\]=0"):
        SketchConfig(groups_pattern={"q_proj": 0})
    with pytest.raises(ValueError, match="keep_base='cpu' with mode='delta'"):
        SketchConfig(keep_base="cpu")
    with pytest.raises(ValueError, match="sketch='here' with index_storage='embed'"):
        SketchConfig(sketch="here", index_storage="embed")
    with pytest.raises(ValueError, match="groups=18: layer first has 17 inputs"):
        sketched(groups=18)
    conv = nn.Sequential(nn.Conv2d(3, 4, 2))
    with pytest.raises(TypeError, match="Target module 0 of type Conv2d: a sketch has tables for the rows"):
        get_peft_model(conv, SketchConfig(target_modules=["0"]))
    broken = TwoLayers()
    broken.second.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layer second: 1 of .* NaN"):
        sketched(broken)


def test_groups_by_layer():
    model = sketched(groups_pattern={"second": 5})
    shapes = {name: tuple(layer.deltas["default"].codebook.shape) for name, layer in layers(model).items()}
    assert shapes == {"first": (33, 2, 8), "second": (5, 5, 8)}
