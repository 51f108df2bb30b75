"""plan: its numbers are those of the adapter that training makes, and it holds no weight."""

import json
import resource
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, LlamaForCausalLM

from sparse_peft import SaRAConfig, SparseConfig
from sparse_peft.cli.fields import parse_fields
from sparse_peft.planning import PlanOptions, plan_training
from sparse_peft.planning.plan import countable
from sparse_peft.registry import METHODS, method_named
from sparse_peft.structure import read_model_config
from sparse_peft.tuners.delta_layer import TunerLayer

LLAMA_7B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "dtype": "bfloat16",
}
GIVEN_SPEED = PlanOptions(flops=1e12, batch=2, length=16)


def settings_of(method):
    return {} if method.short_name == "s2ft" else {"target_modules": "all-linear"}


def data_size(folder):
    """Bytes of an adapter's tensors, without the file's header."""
    path = Path(folder) / "adapter_model.safetensors"
    with open(path, "rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.short_name)
@pytest.mark.parametrize("save_dtype", ["float32", "bfloat16"])
def test_numbers_are_those_of_the_adapter_that_is_made(world, tmp_path, method, save_dtype):
    config = method.config_class(**settings_of(method), save_dtype=save_dtype)
    plan = plan_training(read_model_config(world / "base"), config, GIVEN_SPEED)
    made = method.config_class(**settings_of(method), save_dtype=save_dtype)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(world / "base"), made)
    own = plan.needs[0]
    assert own.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    layers = [module for module in model.modules() if isinstance(module, TunerLayer)]
    assert sum(kind.layers for kind in plan.kinds) == len(layers)
    for kind in plan.kinds:
        members = [layer for layer in layers if layer.name.endswith(kind.kind)]
        assert kind.layers == len(members) and kind.shape == list(members[0].stored_shape)
        assert kind.trained == sum(p.numel() for layer in members for p in layer.deltas["default"].parameters())
    model.save_pretrained(tmp_path)
    # the file pads each tensor to its dtype's size at most
    assert own.file_bytes == pytest.approx(data_size(tmp_path), abs=8 * len(layers) * 4)
    assert own.trained_bytes == own.gradient_bytes == 4 * own.trained and own.optimizer_bytes == 8 * own.trained


def kept_by(model, ids):
    """Bytes that a real forward pass keeps for backward, without weights."""
    weights = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept = {}

    def save(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    assert loss.requires_grad
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("name", [method.short_name for method in METHODS] + ["lora", "full"])
def test_activations_are_those_that_a_real_pass_keeps(world, name):
    config = read_model_config(world / "base")
    method = method_named("sparse" if name in ("lora", "full") else name)
    plan = plan_training(
        config, method.config_class(**settings_of(method)), PlanOptions(flops=1.0, batch=4, length=64)
    )
    need = {"lora": plan.needs[1], "full": plan.needs[2]}.get(name, plan.needs[0])
    model = LlamaForCausalLM.from_pretrained(world / "base").train()
    if name == "lora":
        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    elif name != "full":
        model = get_peft_model(model, method.config_class(**settings_of(method)))
    if name != "full":
        model.enable_input_require_grads()
    real = kept_by(model, torch.randint(0, 96, (4, 64)))
    assert need.activation_bytes == pytest.approx(real, rel=0.06)


def test_operations_are_those_of_the_shapes(world):
    plan = plan_training(read_model_config(world / "base"), SparseConfig(target_modules="all-linear"), GIVEN_SPEED)
    config, tokens = AutoConfig.from_pretrained(world / "base"), 2 * 16
    attention = 2 * 48 * 48 + 2 * 48 * 24
    linear = 2 * (attention + 3 * 48 * 80) + 48 * config.vocab_size
    scores = 2 * (2 * 2 * 16 * 16 * 48) * 2  # two products of each of 2 layers, over 2 rows
    forward = 2 * tokens * linear + scores
    full = plan.needs[2]
    # transformers 5.0 multiplies 6 rotary frequencies by 16 positions as matrices, which is counted like the scores
    expected = 3 * forward, 3 * (forward + 2 * 6 * 16)
    assert any(full.flops == pytest.approx(flops, rel=1e-6) for flops in expected)
    assert full.seconds == full.flops / 1e12
    lora = plan.needs[1]
    factors = sum(2 * 16 * sum(k.shape) * k.layers for k in plan.kinds) * 3 * tokens
    rotary = full.flops - 3 * forward
    assert lora.flops == pytest.approx(2 * 2 * tokens * linear + 3 * scores + rotary + factors, rel=1e-6)
    assert lora.trained == sum(16 * sum(kind.shape) * kind.layers for kind in plan.kinds)
    assert plan.needs[0].flops < full.flops


def test_checkpointing_and_optimizers_and_formats(world):
    config = read_model_config(world / "base")

    def plan(**options):
        return plan_training(config, SparseConfig(target_modules="all-linear"), PlanOptions(flops=1.0, **options))

    plain, less = plan(), plan(checkpointing=True)
    assert less.needs[0].activation_bytes < plain.needs[0].activation_bytes
    assert less.needs[0].flops > plain.needs[0].flops
    assert plan(optimizer="sgd").needs[0].optimizer_bytes == 0
    adam, small = plain.needs[2].optimizer_bytes, plan(optimizer="adamw8bit").needs[2].optimizer_bytes
    assert adam == 8 * plain.parameters and small < adam
    bases = [plan(base=name).needs[0].base_bytes for name in ("float32", "bfloat16", "int8", "nf4")]
    assert bases == sorted(bases, reverse=True) and bases[0] == pytest.approx(2 * bases[1], rel=0.01)


def test_a_7b_model_in_seconds_and_without_weights(tmp_path, run):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B))
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    said = run("plan", tmp_path, "--target-modules", "all-linear", "--flops", "1e14", "--json").said
    assert time.process_time() - start < 20
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 400 * 2**20
    assert said["parameters"] == 6_738_415_616 and said["base"] == "bfloat16"
    assert said["needs"][0]["trained"] == round(0.01 * 32 * (4 * 4096**2 + 3 * 4096 * 11008))
    assert said["needs"][0]["base_bytes"] == pytest.approx(2 * 6_738_415_616, rel=1e-4)
    assert [need["name"] for need in said["needs"]] == ["sparse", "LoRA r=16", "full"]


def test_what_people_read(world, run):
    out = run("plan", world / "base", "--method", "sltrain", "--target-modules", "all-linear", "--flops", "1e9").out
    for words in ("mlp.down_proj", "48x80", "ranks", "LoRA r=16", "peak (estimate)", "An estimate for comparing"):
        assert words in out
    measured = run("plan", world / "base" / "config.json", "--density", "0.02", "--json").said
    assert measured["flops_per_second"] > 1e6 and measured["config"] == {"density": 0.02}


def test_what_is_decided_by_weights_or_data_is_said():
    config, notes = countable(SparseConfig(selection="fisher", allocation="global", density=0.01))
    assert config.selection == "random" and len(notes) == 2 and "from data" in notes[1]
    with pytest.raises(ValueError, match="threshold=0.002: how many entries"):
        countable(SaRAConfig(threshold=2e-3))


def test_a_model_that_takes_no_tokens_is_planned_without_activations(tmp_path, run):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "vit", "architectures": ["ViTModel"], "hidden_size": 32, "intermediate_size": 64,
                    "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8})
    )  # fmt: skip
    said = run("plan", tmp_path, "--target-modules", "all-linear", "--json").said
    assert said["needs"][0]["activation_bytes"] is None and said["needs"][0]["seconds"] is None
    assert "No activations and no time" in said["assumptions"][0]


FIELDS = {
    "density=0.5": 0.5,
    "r=none": None,
    "allocation=erk": "erk",
    "resident=false": False,
    "target_modules=q_proj,v_proj": ["q_proj", "v_proj"],
    "target_modules=all-linear": "all-linear",
    "target_modules=.*q_proj": ".*q_proj",
    "block_size=16,32": [16, 32],
    "reselect_stop=1": 1,
    "reselect_stop=1.0": 1.0,
    'density_pattern={"v_proj": 0.05}': {"v_proj": 0.05},
    "layers-to-transform=0,1": [0, 1],
}


@pytest.mark.parametrize("setting", FIELDS)
def test_fields_are_read_by_their_types(setting):
    (value,) = parse_fields(SparseConfig, [setting]).values()
    assert value == FIELDS[setting] and type(value) is type(FIELDS[setting])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "spars"], "did you mean 'sparse'"),
        (["--set", "densty=0.1"], "did you mean 'density'"),
        (["--method", "s2ft", "--density", "0.1"], "how much trains is said by ratio, k, num_params, r"),
        (["--set", "seed=x"], "seed='x': an int is expected"),
        (["--set", "resident=maybe"], "resident='maybe': true or false"),
        (["--set", "density"], "field=value is expected"),
        (["--set", "density_pattern={bad"], "no valid JSON"),
        (["--density", "3"], "density=3.0: a share in (0, 1]"),
        (["--optimizer", "lion"], "one of adamw, adamw8bit, sgd"),
        (["--base", "int3"], "base='int3'"),
        (["--device", "tpu!"], "device='tpu!'"),
        (["--batch", "0"], "batch=0: at least 1"),
    ],
)
def test_bad_options_are_usage(world, run, arguments, words):
    done = run("plan", world / "base", *arguments, "--json", expect=2)
    assert words in done.said["error"]["message"] and words in done.err.replace("\n", "")
    assert done.said["error"]["kind"] == "usage"


def test_bad_models(world, tmp_path, run):
    assert "no such file or folder" in run("plan", tmp_path / "none", expect=2).err
    assert "this is an adapter" in run("plan", world / "sparse", expect=2).err
    assert "an adapter's config" in run("plan", world / "sparse" / "adapter_config.json", expect=2).err
    bad = tmp_path / "config.json"
    bad.write_text("{")
    assert "not valid JSON" in run("plan", bad, expect=2).err
    bad.write_text('{"model_type": "nothing"}')
    assert "cannot use it" in run("plan", bad, expect=2).err
    missing = run("plan", world / "base", "--target-modules", "nothing", expect=1)
    assert "match no layer" in missing.err or "not found" in missing.err
