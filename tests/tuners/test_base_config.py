"""Configs of all methods: what a constructor accepts can be saved and loaded, and its errors name their fields."""

import copy
import dataclasses
import inspect
import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftConfig, TaskType

import sparse_peft
from sparse_peft import S2FTConfig, SketchConfig, SLTrainConfig, SnellaConfig, SoRAConfig, SparseConfig
from sparse_peft.registry import methods
from sparse_peft.tuners.base_config import required

CONFIGS = [method.config_class for method in methods()]
every_config = pytest.mark.parametrize("config_class", CONFIGS, ids=lambda config_class: config_class.__name__)

numbers = st.integers(-3, 70) | st.sampled_from([2**31, 2**63, -(2**63), 10**30]) | st.floats() | st.floats(0, 1)
numpy_scalars = st.builds(
    lambda kind, number: kind(number),
    st.sampled_from([np.float32, np.float64, np.float16, np.int64, np.int8, np.bool_]),
    st.integers(-1, 20),
)
scalars = (
    st.none()
    | st.booleans()
    | numbers
    | numpy_scalars
    | st.sampled_from(["", "(", "all-linear", "lm_head", "random", "\0", "\ud800", "q.*"])
    | st.builds(torch.tensor, st.integers(-1, 20) | st.floats(0, 1))
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.sampled_from(["", "q", "k.*", "("]), inner, max_size=3)
        | st.sets(st.sampled_from(["q", "k", "v"]))
        | st.builds(range, st.integers(0, 4))
    ),
    max_leaves=5,
)


def choices_of(config_class, name):
    """Values that the field's annotation names."""
    hint = sparse_peft.constraints.describe(sparse_peft.constraints.field_hints(config_class)[name])
    return [text.strip("'") for text in hint.removeprefix("one of ").split(", ")] if "one of" in hint else []


def assert_not_loaded(config_class, fields, folder):
    """A file with fields that the constructor refuses is refused; other values than a file's are left out."""
    try:
        text = json.dumps({"peft_type": config_class.method, **fields})
    except (TypeError, ValueError):
        return
    if all(json.loads(text)[name] == value for name, value in fields.items()):
        (folder / "adapter_config.json").write_text(text)
        with pytest.raises((TypeError, ValueError)):
            config_class.from_pretrained(folder)


@every_config
def test_what_the_constructor_accepts_is_saved_and_loaded_equal(config_class, tmp_path):
    names = [field.name for field in dataclasses.fields(config_class) if field.name != "sparse_peft_version"]
    named = {name: st.sampled_from(choices) for name in names if (choices := choices_of(config_class, name))}
    fields = st.sampled_from(names).flatmap(
        lambda name: st.tuples(st.just(name), named[name] | values if name in named else values)
    )

    @settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.lists(fields, min_size=1, max_size=2).map(dict))
    @example({"resident": 1})
    @example({"init_weights": "random"})
    @example({"fan_in_fan_out": None})
    @example({"seed": 10**30})
    @example({"modules_to_save": "lm_head"})
    @example({"num_params": np.int64(50)})
    @example({"density": np.float32(0.1)})
    @example({"task_type": TaskType.CAUSAL_LM})
    @example({"task_type": "CLM"})
    @example({"target_modules": ("b", "a"), "layers_to_transform": np.arange(3)})
    def run(fields):
        fields = {name: value for name, value in fields.items() if name in names}
        try:
            config = config_class(**fields)
        except (TypeError, ValueError) as error:
            assert any(name in str(error) for name in fields), error
            assert_not_loaded(config_class, fields, tmp_path)
            return
        config.save_pretrained(tmp_path)
        for again in (config_class.from_pretrained(tmp_path), PeftConfig.from_pretrained(tmp_path)):
            assert type(again) is config_class and again == config and again.to_dict() == config.to_dict()
        for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), dataclasses.replace(config)):
            assert twin == config

    run()


@every_config
def test_attributes_are_checked_when_they_are_set(config_class):
    config = config_class(target_modules=["q"])
    config.inference_mode = np.bool_(True)
    assert config.inference_mode is True
    with pytest.raises(TypeError, match="init_weights=0: True or False"):
        config.init_weights = 0
    assert config.init_weights is True


@pytest.mark.parametrize(
    ("config_class", "fields", "message"),
    [
        (SparseConfig, {"density_pattern": 3}, "density_pattern=3: a dict"),
        (SparseConfig, {"task_type": "CLM"}, "task_type='CLM': Invalid task type: 'CLM'"),
        (SparseConfig, {"selection": {}}, "selection={}: one of 'random'"),
        (SparseConfig, {"target_modules": "("}, r"target_modules='\(': .*unterminated"),
        (SparseConfig, {"exclude_modules": "["}, r"exclude_modules='\['"),
        (SparseConfig, {"layers_pattern": ["("], "layers_to_transform": 1}, r"layers_pattern\[0\]='\('"),
        (SparseConfig, {"bias": 3}, "bias=3: a string"),
        (SoRAConfig, {"dropout": ""}, r"dropout='': a probability in \[0, 1\)"),
        (SoRAConfig, {"rank_pattern": {"(": 3}}, r"rank_pattern: key='\('"),
        (S2FTConfig, {"avoid": 3}, "avoid=3: a list"),
        (S2FTConfig, {"avoid": "other"}, r"avoid='other': .*write \['other'\]"),
        (SketchConfig, {"bits": True}, "bits=True: one of 2, 3, 4"),
        (SnellaConfig, {"kernel": None}, "kernel=None: one of"),
        (SLTrainConfig, {"r": 2.5}, "r=2.5: an int of at least 1"),
    ],
)
def test_errors_name_the_field(config_class, fields, message):
    with pytest.raises((TypeError, ValueError), match=message):
        config_class(**fields)


# ---------------------------------------------------------------------- fields that do not exist


@pytest.mark.parametrize(
    ("config_class", "name", "cure"),
    [
        (SparseConfig, "lora_alpha", "a field of LoRA, 'scale' takes its place"),
        (SoRAConfig, "lora_alpha", "a field of LoRA, 'alpha' takes its place"),
        (SLTrainConfig, "lora_dropout", "a field of LoRA, 'dropout' takes its place"),
        (SparseConfig, "lora_dropout", "a field of LoRA; leave it out, inputs cannot be dropped"),
        (S2FTConfig, "init_lora_weights", "a field of LoRA, 'init_weights' takes its place"),
        (S2FTConfig, "rank_pattern", "a field of LoRA, 'ratio_pattern' takes its place"),
        (SparseConfig, "use_dora", "a field of LoRA without a counterpart; leave it out"),
        (SparseConfig, "densty", "did you mean 'density'?"),
        (S2FTConfig, "density", "the budget is one of ratio, k, num_params, r"),
        (SnellaConfig, "xyzzy", "the fields are target_modules"),
    ],
)
def test_unknown_fields_are_explained(config_class, name, cure):
    expected = f"{config_class.__name__}() got an unexpected keyword argument '{name}': {cure}"
    with pytest.raises(TypeError) as error:
        config_class(**{name: 8})
    assert expected in str(error.value)


@every_config
def test_all_of_a_lora_config(config_class):
    with pytest.raises(TypeError) as error:
        config_class(**LoraConfig(r=8, target_modules=["q"]).to_dict())
    assert "'lora_alpha': a field of LoRA" in str(error.value)
    assert "'use_dora'" in str(error.value) and "fields of LoRA without a counterpart" in str(error.value)


@every_config
def test_the_signature_has_the_fields(config_class):
    assert list(inspect.signature(config_class).parameters) == [
        field.name for field in dataclasses.fields(config_class)
    ]


# ---------------------------------------------------------------------- versions


def written_by(folder, version, **fields):
    SparseConfig(density=0.1).save_pretrained(folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sparse_peft_version": version, **fields}))


def test_a_saved_config_has_the_version(tmp_path):
    SparseConfig().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["sparse_peft_version"] == sparse_peft.__version__
    written_by(tmp_path, "0.0.1")
    assert SparseConfig.from_pretrained(tmp_path).sparse_peft_version == sparse_peft.__version__


@pytest.mark.parametrize("load", [SparseConfig.from_pretrained, PeftConfig.from_pretrained])
def test_a_newer_version_is_named_with_the_right_package(tmp_path, load):
    written_by(tmp_path, "99.1", sharpness=3)
    with pytest.warns(UserWarning, match=r"'sharpness' of the adapter's config ignored.*pip install \. in a checkout"):
        assert load(tmp_path).density == 0.1
    written_by(tmp_path, "99.1", density="auto")
    with pytest.raises(
        TypeError, match=r"density='auto': .*written by sparse_peft 99\.1.*pip install \. in a checkout"
    ):
        load(tmp_path)


@pytest.mark.parametrize("version", [None, "0.0.1", "no version"])
def test_fields_that_no_newer_version_explains_are_pefts_affair(tmp_path, version):
    written_by(tmp_path, version, sharpness=3)
    with pytest.warns(UserWarning, match="Unexpected keyword arguments .*'sharpness'"):
        assert SparseConfig.from_pretrained(tmp_path).density == 0.1


def test_resolved_fields_are_required_by_name():
    assert required(3, "num_entries") == 3
    with pytest.raises(ValueError, match="num_entries=None: it is filled in when an adapter is made"):
        required(SparseConfig().num_entries, "num_entries")


def test_a_config_stays_small_whatever_the_number_of_layers(tmp_path):
    """Sizes of hundreds of layers are neither in its repr nor on lines of their own in its file."""
    layers = [f"layers.{i}.proj" for i in range(300)]
    config = SparseConfig(target_modules=["proj"])
    config.num_entries = dict.fromkeys(layers, 5)
    config.weight_shapes = {layer: [7, 11] for layer in layers}
    assert len(repr(config)) < 2000 and "density" in repr(config)
    config.save_pretrained(tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    assert text.count("\n") == len(json.loads(text)) + 1
    assert PeftConfig.from_pretrained(tmp_path) == config
    (tmp_path / "adapter_config.json").write_text(json.dumps(json.loads(text), indent=2))  # as earlier versions did
    assert PeftConfig.from_pretrained(tmp_path) == config
