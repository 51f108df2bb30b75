"""Sketches from data: against the same steps written out densely; the model is unchanged afterwards."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from sparse_peft import SketchConfig, sketch_model
from sparse_peft.calibrate import assign_codes, compensated_sketch, fit_codebooks, output_error, refit_codebooks
from sparse_peft.calibrate.block_chain import Chain
from sparse_peft.ops import pack_codes, unpack_codes

QKVO = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]


def llama(layers=3, hidden=24):
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=hidden,
        intermediate_size=40,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        initializer_range=0.3,
    )
    torch.manual_seed(3)
    return LlamaForCausalLM(config).eval()


def batches(count=3, size=4, length=12, vocabulary=61):
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, vocabulary, (size, length), generator=generator)} for _ in range(count)]


def config_of(targets=QKVO, **options):
    return SketchConfig(target_modules=list(targets), **{"mode": "replace", "bits": 3, "groups": 2, **options})


def decode(sketch):
    codes = unpack_codes(sketch.codes, sketch.bits, sketch.cols).long()
    group = torch.arange(sketch.cols) * sketch.groups // sketch.cols
    return sketch.codebooks[torch.arange(codes.shape[0])[:, None], group, codes]


def rows_of(module):
    return module.weight.detach().t() if isinstance(module, Conv1D) else module.weight.detach()


@torch.no_grad()
def moments_of(model, names, data, keep=lambda batch: None):
    """Mean of ``x x^T`` over all tokens that count, in float64, by running the whole model."""
    found = {name: [] for name in names}
    mask = None

    def hook(name):
        def see(module, args):
            x = args[0].double()
            found[name].append(x.flatten(0, 1) if mask is None else x[mask.bool()])

        return see

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    for batch in data:
        mask = batch.get("attention_mask")
        model(**batch)
    for handle in handles:
        handle.remove()
    return {name: (x := torch.cat(parts)).t() @ x / len(x) for name, parts in found.items()}


def plainly(model, names, data, bits=3, groups=2, sequential=True):
    """The tables and codes of the layers, block by block, with the whole model run for each."""
    model = copy.deepcopy(model)
    blocks = sorted({name.split(".")[2] for name in names}, key=int)
    dense = None if sequential else moments_of(model, names, data)
    found = {}
    for block in blocks:
        inside = [name for name in names if name.split(".")[2] == block]
        moments = dense or moments_of(model, inside, data)
        for name in inside:
            weight = rows_of(model.get_submodule(name))
            tables = fit_codebooks(weight, bits, groups, weights=moments[name].diagonal().sqrt())
            _, codes = compensated_sketch(weight, moments[name], bits, groups, codebooks=tables)
            tables = refit_codebooks(weight, codes, moments[name], tables)
            group = torch.arange(weight.shape[1]) * groups // weight.shape[1]
            found[name] = tables[torch.arange(len(weight))[:, None], group, codes.long()], moments[name]
        for name in inside:
            rows_of(model.get_submodule(name)).copy_(found[name][0])
    return found


def names_of(model, targets=QKVO):
    return [name for name, _ in model.named_modules() if name.rpartition(".")[2] in targets]


def assert_nearly_equal(model, sketches, expected):
    """Float32 passes against float64 ones: a code in a thousand may fall the other way, and pull its row along."""
    for name, (decoded, moment) in expected.items():
        same = (decode(sketches[name]) - decoded).abs() < 2e-3 * decoded.abs().amax()
        assert same.float().mean() > 0.6, name
        weight = rows_of(model.get_submodule(name))
        errors = [output_error(weight, other, moment) for other in (decode(sketches[name]), decoded)]
        assert errors[0] == pytest.approx(errors[1], rel=0.02), name


# ------------------------------------------------------------------ against the plain steps


@pytest.mark.parametrize("sequential", [True, False, None])
def test_sketches_are_those_of_the_plain_steps(sequential):
    model, data = llama(), batches()

    config = sketch_model(model, config_of(), iter(data), sequential=sequential, progress=False)

    assert list(config.sketches) == names_of(model)
    assert_nearly_equal(
        model, config.sketches, plainly(model, names_of(model), data, sequential=sequential is not False)
    )


def test_running_blocks_one_by_one_is_different_from_the_dense_models_inputs():
    model, data = llama(), batches()
    first, second = (
        sketch_model(model, config_of(), data, sequential=sequential, progress=False).sketches
        for sequential in (True, False)
    )

    same = {name: torch.equal(first[name].codes, second[name].codes) for name in first}
    assert all(same[name] for name in same if name.startswith("model.layers.0."))
    assert not any(same[name] for name in same if name.startswith("model.layers.2."))


def test_gpt2_with_conv1d_and_a_cache():
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=61, n_embd=24, n_layer=2, n_head=4, n_positions=32, initializer_range=0.3)
    ).eval()
    targets = ["c_attn", "c_proj"]
    data = [{**batch, "use_cache": True} for batch in batches()]

    config = sketch_model(model, config_of(targets), data, sequential=True, progress=False)

    assert config.sketches["transformer.h.0.attn.c_attn"].codes.shape[0] == 72
    assert_nearly_equal(model, config.sketches, plainly(model, names_of(model, targets), data))


def test_padding_does_not_count():
    model, (batch, *_) = llama(layers=2), batches(1, 6, 9)
    ids = torch.cat((batch["input_ids"], torch.zeros(6, 5, dtype=torch.int64)), 1)
    padded = {"input_ids": ids, "attention_mask": torch.cat((torch.ones(6, 9), torch.zeros(6, 5)), 1).long()}

    found = sketch_model(model, config_of(), [padded], progress=False).sketches
    plain = sketch_model(model, config_of(), [batch], progress=False).sketches

    for name in plain:
        assert (decode(found[name]) == decode(plain[name])).float().mean() > 0.0
        torch.testing.assert_close(found[name].codebooks, plain[name].codebooks, rtol=0.02, atol=2e-2)


def test_layers_outside_of_blocks_see_the_dense_models_inputs():
    model, data = llama(layers=2), batches()

    config = sketch_model(model, config_of([*QKVO, "lm_head"]), data, progress=False)

    weight = model.lm_head.weight.detach()
    moment = moments_of(model, ["lm_head"], data)["lm_head"]
    tables = fit_codebooks(weight, 3, 2, weights=moment.diagonal().sqrt())
    _, codes = compensated_sketch(weight, moment, 3, 2, codebooks=tables)
    expected = refit_codebooks(weight, codes, moment, tables)
    group = torch.arange(24) * 2 // 24
    decoded = expected[torch.arange(61)[:, None], group, codes.long()]
    assert_nearly_equal(model, config.sketches, {"lm_head": (decoded, moment)})


def test_layers_have_groups_of_their_own():
    model = llama(layers=2)
    config = config_of(groups_pattern={"down_proj": 5})

    sketches = sketch_model(model, config, batches(), progress=False).sketches

    assert sketches["model.layers.1.mlp.down_proj"].codebooks.shape == (24, 5, 8)
    assert sketches["model.layers.1.self_attn.q_proj"].codebooks.shape == (24, 2, 8)


# ------------------------------------------------------------------ what they are good for


def test_each_step_lowers_the_error_of_the_output():
    model, data = llama(layers=1, hidden=32), batches(6)
    names = names_of(model)
    moments = moments_of(model, names, data)

    def error(**steps):
        found = sketch_model(model, config_of(groups=1), data, progress=False, **steps).sketches
        return sum(output_error(model.get_submodule(n).weight, decode(found[n]), moments[n]) for n in names)

    nearest = 0.0
    for name in names:
        weight = model.get_submodule(name).weight.detach()
        tables = fit_codebooks(weight, 3)
        codes = assign_codes(weight, tables)
        nearest += output_error(weight, tables[torch.arange(len(weight))[:, None], 0, codes.long()], moments[name])
    weighted = error(compensate=False, refit=False)
    refitted, swept, both = error(compensate=False), error(refit=False), error()
    assert both < swept < weighted < nearest
    assert both < refitted < weighted


def test_weighted_tables_alone_are_found_again(tmp_path):
    model, data = llama(layers=2), batches()
    config = config_of(mode="delta", index_storage="recompute")
    config = sketch_model(model, config, data, compensate=False, refit=False, progress=False)

    adapted = get_peft_model(model, config)
    adapted.save_pretrained(tmp_path)

    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    again = PeftModel.from_pretrained(llama(layers=2), tmp_path)
    for name, sketch in config.sketches.items():
        layer = again.base_model.model.get_submodule(name)
        assert torch.equal(layer.sketch("default").codes, sketch.codes)


@pytest.mark.parametrize("mode", ["replace", "delta"])
def test_an_adapter_takes_the_sketches(mode):
    model, data = llama(layers=2), batches()
    dense = copy.deepcopy(model)
    config = sketch_model(model, config_of(mode=mode), data, progress=False)

    adapted = get_peft_model(model, config)

    for name, sketch in config.sketches.items():
        rows_of(dense.get_submodule(name)).copy_(decode(sketch))
    reference = dense if mode == "replace" else llama(layers=2)
    with torch.no_grad():
        torch.testing.assert_close(adapted(**data[0]).logits, reference(**data[0]).logits, rtol=1e-5, atol=1e-5)
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    assert torch.equal(layer.sketch("default").codes, config.sketches["model.layers.0.self_attn.q_proj"].codes)


def test_half_precision_models_and_rounded_tables():
    model, data = llama(layers=2).bfloat16(), batches()

    sketches = sketch_model(model, config_of(initial_dtype="bfloat16"), data, progress=False).sketches

    for sketch in sketches.values():
        assert torch.equal(sketch.codebooks, sketch.codebooks.bfloat16().float())
        assert bool((sketch.codebooks.diff(dim=2) >= 0).all())


# ------------------------------------------------------------------ nothing else happens


@pytest.mark.parametrize("sequential", [True, False])
def test_the_model_and_the_config_stay_as_they_are(sequential):
    model, config = llama(), config_of()
    before = copy.deepcopy(model.state_dict())
    training = {name: module.training for name, module in model.named_modules()}

    sketch_model(model, config, batches(), sequential=sequential, progress=False)

    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert "sketches" not in config.__dict__
    for name, module in model.named_modules():
        assert not module._forward_hooks and not module._forward_pre_hooks and "forward" not in module.__dict__
        assert module.training is training[name]


def test_an_exception_leaves_nothing_behind(monkeypatch):
    model, calls = llama(), []
    advance = Chain.advance

    def fail(self, index):
        calls.append(model.model.layers[index].self_attn.q_proj.forward)
        advance(self, index)
        raise KeyError("stopped")

    monkeypatch.setattr(Chain, "advance", fail)
    with pytest.raises(KeyError, match="stopped"):
        sketch_model(model, config_of(), batches(), progress=False)

    assert calls[0].__name__ == "forward" and not hasattr(calls[0], "__self__")  # the decoded one
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks and "forward" not in module.__dict__


def test_a_forward_of_the_layers_own_comes_back():
    model = llama(layers=2)
    layer = model.model.layers[0].self_attn.q_proj
    own = lambda x: nn.functional.linear(x, layer.weight, layer.bias)  # noqa: E731
    layer.forward = own

    sketch_model(model, config_of(), batches(), progress=False)

    assert layer.forward is own


def test_the_bar_counts_layers(capfd, monkeypatch):
    monkeypatch.setattr(logging, "_tqdm_active", True)  # other tests turn bars off
    sketch_model(llama(layers=1), config_of(), batches())
    assert "sketching: 100%" in capfd.readouterr().err

    sketch_model(llama(layers=1), config_of(), batches(), progress=False)
    assert "sketching" not in capfd.readouterr().err


# ------------------------------------------------------------------ bad data


class Crooked(nn.Module):
    """Blocks that skip one another, as in a U-Net."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        first = self.blocks[0](x)
        return self.blocks[2](first + self.blocks[1](first))


def test_blocks_that_are_no_chain():
    model, data = Crooked(), [{"x": torch.randn(40, 8)}]
    config = config_of(["0", "1", "2"], groups=1)

    found = sketch_model(model, config, data, progress=False).sketches

    dense = sketch_model(model, config, data, sequential=False, progress=False).sketches
    assert all(torch.equal(found[name].codes, dense[name].codes) for name in dense)
    with pytest.raises(ValueError, match="block 2 of blocks does not take the output of the block before it"):
        sketch_model(model, config, data, sequential=True, progress=False)
    with pytest.raises(ValueError, match=r"no layer of Sequential .* nn\.ModuleList"):
        sketch_model(nn.Sequential(nn.Linear(8, 8)), config_of(["0"]), data, sequential=True, progress=False)


@pytest.mark.parametrize("sequential", [True, False])
def test_a_batch_that_is_not_finite_is_skipped(sequential):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    torch.manual_seed(0)
    model, good = Model(), {"x": torch.randn(40, 8)}
    bad = {"x": torch.full((40, 8), torch.inf)}
    config = config_of(["0", "1"], groups=1)

    with pytest.warns(RuntimeWarning, match="batch 1 is skipped: the (hidden states|inputs)"):
        found = sketch_model(model, config, [good, bad], sequential=sequential, progress=False).sketches

    expected = sketch_model(model, config, [good], sequential=sequential, progress=False).sketches
    assert all(torch.equal(found[name].codebooks, expected[name].codebooks) for name in expected)
    with pytest.raises(ValueError, match="all 1 batches were skipped"), pytest.warns(RuntimeWarning):
        sketch_model(model, config, [bad], sequential=sequential, progress=False)


def test_bad_input_is_named():
    model = llama(layers=1)
    with pytest.raises(ValueError, match="compensate=False, refit=False, importance=0"):
        sketch_model(model, config_of(), batches(), compensate=False, refit=False, importance=0)
    with pytest.raises(ValueError, match="importance=-1"):
        sketch_model(model, config_of(), batches(), importance=-1)
    with pytest.raises(ValueError, match="no batches"):
        sketch_model(model, config_of(), [], progress=False)
    with pytest.raises(TypeError, match="a batch of type Tensor"):
        sketch_model(model, config_of(), [torch.zeros(2, 3)], progress=False)
    with pytest.raises(ValueError, match="match no layer"):
        sketch_model(model, config_of(["nothing"]), batches(), progress=False)
    with pytest.warns(RuntimeWarning, match="layers saw fewer tokens .* layer model.layers.0.self_attn.q_proj 5;"):
        sketch_model(model, config_of(), [{"input_ids": torch.arange(5)[None]}], progress=False)
    unused = llama(layers=1)
    unused.spare = nn.Linear(8, 8)
    with pytest.raises(ValueError, match="layer spare: no token of the data reached it"):
        sketch_model(unused, config_of(["spare"]), batches(), progress=False)
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight[1, 2] = torch.nan
    with pytest.raises(ValueError, match=r"layer model\.layers\.0\.self_attn\.q_proj|k_proj|hidden states|skipped"):
        sketch_model(model, config_of(), batches(), progress=False)


def test_packed_codes_have_their_width():
    sketches = sketch_model(llama(layers=1), config_of(bits=2, groups=3), batches(), progress=False).sketches
    sketch = sketches["model.layers.0.mlp.down_proj"]

    assert sketch.codes.shape == (24, 10)  # 40 codes of 2 bits
    assert torch.equal(pack_codes(unpack_codes(sketch.codes, 2, 40), 2), sketch.codes)
