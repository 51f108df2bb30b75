"""What users of PEFT expect of any adapter, on real architectures built small."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_layer_status, get_model_status, get_peft_model
from peft import inject_adapter_in_model as inject
from peft.utils import PeftType, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from sparse_peft import SparseConfig, SparseLinear, SparseModel
from sparse_peft.support import Support
from tests.helpers.methods import METHODS
from tests.helpers.processes import run_code
from tests.helpers.two_layers import TwoLayers, adapted, effective_weights, layers_of, oracle_output
from tests.helpers.versions import transformers_adapters


def llama(**kwargs):
    torch.manual_seed(0)
    config = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        **kwargs,
    }
    return LlamaForCausalLM(LlamaConfig(**config)).eval()


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)).eval()


def tokens(n=3, length=6):
    return torch.randint(0, 64, (n, length))


def test_type_is_a_real_member_and_prefix_is_the_lower_case_type():
    assert PeftType("SPARSE_PEFT_DELTA") is PeftType.SPARSE_PEFT_DELTA
    assert SparseConfig().peft_type is PeftType.SPARSE_PEFT_DELTA


def test_what_peft_asks_of_the_classes_follows_from_the_config():
    assert SparseLinear.delta_container == "sparse_peft_delta_adapter"
    assert SparseLinear.adapter_layer_names == ("sparse_peft_delta_adapter",)
    assert SparseModel.prefix == "sparse_peft_delta_" and SparseModel.tuner_layer_cls is SparseLinear
    assert "(first): sparse_peft.SparseLinear(" in str(adapted()[0])


def test_config_round_trip(tmp_path):
    config = SparseConfig(r=4, density_pattern={"q_proj": 0.5}, target_modules=["b", "a"], allocation="erk", seed=3)
    config.save_pretrained(tmp_path)
    again = PeftConfig.from_pretrained(tmp_path)
    assert type(again) is SparseConfig and again.to_dict() == config.to_dict()


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("targets", ["all-linear", None, r".*\.0\..*(q_proj|o_proj|c_proj|c_attn)"])
def test_targets_names_and_counts(make, targets):
    config = SparseConfig(density=0.1, target_modules=targets)
    model = get_peft_model(make(), config)
    counts = {n: d.values.numel() for n, d in _deltas(model)}
    assert counts and counts == config.num_entries
    total = sum(rows * cols for rows, cols in config.weight_shapes.values())
    assert sum(counts.values()) == round(0.1 * total)


def _deltas(model, adapter="default"):
    return [
        (n.removeprefix("base_model.model."), m.deltas[adapter])
        for n, m in model.named_modules()
        if hasattr(m, "deltas")
    ]


def test_layers_of_equal_shape_never_share_a_mask():
    model = get_peft_model(llama(), SparseConfig(density=0.1, target_modules="all-linear"))
    by_shape = {}
    for name, delta in _deltas(model):
        for other in by_shape.setdefault(delta.shape, []):
            assert not torch.equal(delta.support.indices, other), name
        by_shape[delta.shape].append(delta.support.indices)


def test_same_seed_same_positions_another_seed_others():
    first, second, third = (
        dict(_deltas(get_peft_model(llama(), SparseConfig(density=0.1, target_modules="all-linear", seed=s))))
        for s in (0, 0, 1)
    )
    for name in first:
        assert torch.equal(first[name].support.indices, second[name].support.indices)
        assert not torch.equal(first[name].support.indices, third[name].support.indices)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_round_trip_is_bit_exact_and_merging_keeps_it(make, tmp_path):
    config = SparseConfig(density=0.1, target_modules="all-linear", init_weights=False, selection="magnitude")
    model = get_peft_model(make(), config).eval()
    ids = tokens()
    with torch.no_grad():
        expected = model(ids).logits
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(make(), tmp_path)
        assert torch.equal(again(ids).logits, expected)
        low = PeftModel.from_pretrained(make(), tmp_path, low_cpu_mem_usage=True)
        assert torch.equal(low(ids).logits, expected)
        assert torch.equal(again.merge_and_unload()(ids).logits, expected)


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "base's dtype"])
@pytest.mark.parametrize("method", METHODS)
def test_low_cpu_mem_usage_loads_the_same_bits(method, autocast, tmp_path):
    """Also where the base is narrower than the values."""
    make, fields = METHODS[method]
    model = get_peft_model(half_layers(), make(**{**fields, "target_modules": ["first", "second"]}))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    usual, low = (
        PeftModel.from_pretrained(
            half_layers(), tmp_path, autocast_adapter_dtype=autocast, low_cpu_mem_usage=low
        ).state_dict()
        for low in (False, True)
    )
    assert usual.keys() == low.keys()
    for name, tensor in usual.items():
        assert low[name].dtype == tensor.dtype and torch.equal(low[name], tensor), name
    if autocast:
        trained = model.state_dict()
        assert all(torch.equal(low[name], trained[name]) for name in low if name in trained)


def half_layers():
    torch.manual_seed(0)
    return TwoLayers().bfloat16()


def test_a_loaded_adapter_keeps_its_counts_and_positions_whatever_its_config_would_draw(tmp_path):
    model = get_peft_model(llama(), SparseConfig(density=0.1, target_modules="all-linear", init_weights=False))
    model.save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    counts = dict(config.num_entries)
    other_base = llama()
    with torch.no_grad():
        for p in other_base.parameters():
            p.add_(1)
    again = PeftModel.from_pretrained(other_base, tmp_path)
    assert again.peft_config["default"].num_entries == counts
    for (_, a), (_, b) in zip(_deltas(model), _deltas(again), strict=True):
        assert torch.equal(a.support.indices, b.support.indices) and torch.equal(a.values, b.values)


def test_changing_a_budget_field_resolves_anew():
    config = SparseConfig(density=0.1, target_modules="all-linear")
    get_peft_model(llama(), config)
    first = sum(config.num_entries.values())
    get_peft_model(llama(), config)
    assert sum(config.num_entries.values()) == first
    config.density = 0.2
    assert config.num_entries is None
    get_peft_model(llama(), config)
    assert abs(sum(config.num_entries.values()) - 2 * first) <= 1


def test_a_saved_config_used_for_a_new_adapter_draws_its_positions_at_first_use(tmp_path):
    config = SparseConfig(density=0.1, target_modules="all-linear", selection="magnitude")
    fresh = get_peft_model(llama(), config)
    config.save_pretrained(tmp_path)
    later = get_peft_model(llama(), PeftConfig.from_pretrained(tmp_path))
    assert not any(d.is_set for _, d in _deltas(later))
    later(tokens())
    for (_, a), (_, b) in zip(_deltas(fresh), _deltas(later), strict=True):
        assert a.support == b.support
    again = get_peft_model(llama(), PeftConfig.from_pretrained(tmp_path))
    state = get_peft_model_state_dict(again)  # saving counts as use
    assert all((v >= 0).all() for k, v in state.items() if k.endswith("indices"))


def test_same_config_object_under_a_second_name_trains_the_same_positions():
    model = get_peft_model(llama(), SparseConfig(density=0.1, target_modules="all-linear", init_weights=False))
    with torch.no_grad():  # as after a reselection
        for _, delta in _deltas(model):
            rows, cols = delta.shape
            delta.support = Support((rows, cols), torch.arange(delta.values.numel()) + (rows * cols) // 2)
    model.add_adapter("ref", model.peft_config["default"])
    for (_, a), (_, b) in zip(_deltas(model), _deltas(model, "ref"), strict=True):
        assert a.support == b.support
        own, other = (next(iter(delta.support.stored)).data_ptr() for delta in (a, b))
        assert own != other


def test_trl_reference_copy_by_name_copies_the_adapter():
    model = get_peft_model(llama(), SparseConfig(density=0.1, target_modules="all-linear", init_weights=False)).eval()
    ids = tokens()
    expected = model(ids).logits
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    model.set_adapter("ref")
    assert torch.equal(model(ids).logits, expected)


def test_mixed_batches_equal_single_adapter_runs():
    model = get_peft_model(llama(), SparseConfig(density=0.1, target_modules=["q_proj"], init_weights=False)).eval()
    other = SparseConfig(density=0.2, target_modules=["q_proj", "down_proj"], init_weights=False, seed=1)
    model.add_adapter("other", other)
    ids = tokens(5)
    names = ["default", "__base__", "other", "default", "other"]
    singles = {}
    with torch.no_grad():
        for name in ("default", "other"):
            model.set_adapter(name)
            singles[name] = model(ids).logits
        with model.disable_adapter():
            singles["__base__"] = model(ids).logits
        mixed = model(ids, adapter_names=names).logits
        generated = model.generate(input_ids=ids, adapter_names=names, max_new_tokens=3, num_beams=2, do_sample=False)
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], singles[name][row], rtol=1e-4, atol=1e-5)
    assert len(generated) == 5
    with pytest.raises(ValueError, match=r"non-existing adapter.*: nobody"):
        model(ids, adapter_names=["nobody"] * 5)
    with pytest.raises(ValueError, match="Length of `adapter_names` should be the same"):
        model(ids, adapter_names=["default"])
    with pytest.raises(TypeError, match="a list with one adapter name for each input"):
        model(ids, adapter_names="default")
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        model(ids, adapter_names=names)


def test_mixed_batch_with_beams_in_an_encoder_decoder():
    config = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0, pad_token_id=0
    )
    torch.manual_seed(0)
    model = get_peft_model(
        T5ForConditionalGeneration(config), SparseConfig(target_modules=["q", "wo"], density=0.2, init_weights=False)
    ).eval()
    model.add_adapter("other", SparseConfig(target_modules=["q", "wo"], density=0.2, init_weights=False, seed=1))
    ids = tokens(3)
    options = {"input_ids": ids, "max_new_tokens": 5, "num_beams": 3, "do_sample": False}
    mixed = model.generate(adapter_names=["default", "other", "__base__"], **options)
    alone = model.generate(**options)
    model.set_adapter("other")
    other = model.generate(**options)
    assert torch.equal(mixed[0], alone[0][: mixed.shape[1]])
    assert torch.equal(mixed[1], other[1][: mixed.shape[1]])


def test_modules_to_save_and_token_indices_travel(tmp_path):
    config = SparseConfig(
        density=0.1,
        target_modules=["q_proj"],
        modules_to_save=["lm_head"],
        trainable_token_indices=[1, 5],
        init_weights=False,
    )
    model = get_peft_model(llama(), config)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any("lm_head" in n for n in trainable) and any("trainable_tokens_delta" in n for n in trainable)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if n in trainable:
                p.add_(torch.randn_like(p) * 0.1)
    model.eval()
    ids = tokens()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path)
    expected = model(ids).logits
    assert torch.equal(again(ids).logits, expected)
    torch.testing.assert_close(again.merge_and_unload()(ids).logits, expected)


def test_exclude_layers_to_transform_and_patterns():
    model = get_peft_model(
        llama(),
        SparseConfig(
            density=0.1, target_modules=["q_proj", "v_proj"], layers_to_transform=[1], exclude_modules=["v_proj"]
        ),
    )
    assert [n for n, _ in _deltas(model)] == ["model.layers.1.self_attn.q_proj"]
    config = SparseConfig(density=0.1, density_pattern={"q_proj": 0.5}, target_modules=["q_proj", "v_proj"])
    get_peft_model(llama(), config)
    assert config.num_entries["model.layers.0.self_attn.q_proj"] == 512
    assert config.num_entries["model.layers.0.self_attn.v_proj"] == round(0.1 * 512)
    with pytest.warns(RuntimeWarning, match="nothing_like_it"):
        get_peft_model(llama(), SparseConfig(density_pattern={"nothing_like_it": 0.5}, target_modules=["q_proj"]))


def test_status_reports():
    model = get_peft_model(llama(), SparseConfig(density=0.1, target_modules=["q_proj"]))
    status = get_model_status(model)
    assert status.active_adapters == ["default"] and status.merged_adapters == [] and status.enabled is True
    assert status.trainable_params == sum(model.peft_config["default"].num_entries.values())
    assert "SPARSE_PEFT_DELTA" in status.adapter_model_type or status.peft_types
    assert all(layer.requires_grad == {"default": True} for layer in get_layer_status(model))
    text = repr(model)
    assert "sparse_peft.SparseLinear" in text and "entries=" in text


def test_low_level_injection_and_state_dicts():
    model = inject(SparseConfig(density=0.1, target_modules=["first"], init_weights=False), TwoLayers())
    state = get_peft_model_state_dict(model)
    names = ("cols", "row_counts", "values")
    assert sorted(state) == [f"first.sparse_peft_delta_adapter.{name}" for name in names]
    fresh = inject(SparseConfig(density=0.1, target_modules=["first"], seed=5), TwoLayers())
    result = set_peft_model_state_dict(fresh, state)
    assert not result.unexpected_keys
    for key, value in get_peft_model_state_dict(fresh).items():
        assert torch.equal(value, state[key])


def test_injection_from_a_state_dict_takes_the_sizes_of_the_file():
    model = inject(SparseConfig(density=0.3, target_modules=["first"], init_weights=False), TwoLayers())
    state = get_peft_model_state_dict(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fresh = inject(SparseConfig(target_modules=["first"]), TwoLayers(), state_dict=state)
    set_peft_model_state_dict(fresh, state)
    assert torch.equal(fresh.first.get_delta_weight("default"), model.first.get_delta_weight("default"))


@transformers_adapters
def test_transformers_own_adapter_methods(tmp_path):
    model = llama()
    model.add_adapter(SparseConfig(density=0.1, target_modules=["q_proj"], init_weights=False), adapter_name="mine")
    ids = tokens()
    with torch.no_grad():
        expected = model(ids).logits
        model.disable_adapters()
        assert torch.equal(model(ids).logits, llama()(ids).logits)
        model.enable_adapters()
        assert torch.equal(model(ids).logits, expected)
        model.save_pretrained(tmp_path)
        again = llama()
        again.load_adapter(str(tmp_path), adapter_name="mine")
        assert torch.equal(again(ids).logits, expected)
        again.delete_adapter("mine")
        assert torch.equal(again(ids).logits, llama()(ids).logits)


def test_auto_class_loads_with_a_saved_base(tmp_path):
    base = llama()
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(tmp_path / "base"),
        SparseConfig(density=0.1, target_modules=["q_proj"], init_weights=False, task_type="CAUSAL_LM"),
    ).eval()
    model.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    ids = tokens()
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_loading_without_the_import_names_the_package(tmp_path):
    get_peft_model(llama(), SparseConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    code = f"from peft import PeftConfig\nPeftConfig.from_pretrained({str(tmp_path)!r})"
    # an interpreter of its own: it starts without what finds the package
    alone = {**os.environ, "SPARSE_PEFT_AUTOLOAD": "0"}
    failed = subprocess.run([sys.executable, "-c", code], env=alone, capture_output=True, text=True)
    assert "KeyError: 'SPARSE_PEFT_DELTA'" in failed.stderr
    done = run_code("import sparse_peft\n" + code)
    assert done.returncode == 0, done.stderr


def test_dtype_of_values_follows_autocast_adapter_dtype():
    for autocast, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        model = get_peft_model(
            llama().to(torch.bfloat16), SparseConfig(target_modules=["q_proj"]), autocast_adapter_dtype=autocast
        )
        assert {d.values.dtype for _, d in _deltas(model)} == {dtype}


def test_layers_as_small_as_twenty_by_two():
    model = get_peft_model(nn.Sequential(nn.Linear(10, 20), nn.Linear(20, 2)), SparseConfig(target_modules=["0", "1"]))
    assert [d.values.numel() for _, d in _deltas(model)] == [16, 16]
    model = get_peft_model(
        nn.Sequential(nn.Linear(10, 20), nn.Linear(20, 2)), SparseConfig(target_modules=["0", "1"], density=0.01)
    )
    assert [d.values.numel() for _, d in _deltas(model)] == [1, 1]


def test_deleting_the_active_adapter_leaves_the_other(tmp_path):
    model, reference = adapted()
    model.add_adapter("other", SparseConfig(density=0.3, target_modules=["first"], seed=2, init_weights=False))
    model(torch.randn(2, 17))
    with pytest.warns(UserWarning, match="was active which is now deleted"):
        model.delete_adapter("default")
    x = torch.randn(3, 17)
    model.set_adapter("other")
    expected = oracle_output(
        reference,
        {"second": reference.second.weight.double()} | effective_weights(model, reference, ("other",)),
        x.double(),
    )
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-4, atol=1e-4)
    assert "default" not in layers_of(model)["first"].deltas
