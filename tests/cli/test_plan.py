"""The command plan: what people read, what programs read, what is refused."""

import json
import resource
import time

import pytest

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


def test_a_model_that_takes_no_tokens_is_planned_without_activations(tmp_path, run):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "vit", "architectures": ["ViTModel"], "hidden_size": 32, "intermediate_size": 64,
                    "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8})
    )  # fmt: skip
    said = run("plan", tmp_path, "--target-modules", "all-linear", "--json").said
    assert said["needs"][0]["activation_bytes"] is None and said["needs"][0]["seconds"] is None
    assert "No activations and no time" in said["assumptions"][0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "spars"], "did you mean 'sparse'"),
        (["--set", "densty=0.1"], "did you mean 'density'"),
        (["--method", "s2ft", "--density", "0.1"], "the budget is one of ratio, k, num_params, r"),
        (["--set", "seed=x"], "seed='x': an int is expected"),
        (["--set", "resident=maybe"], "resident='maybe': True or False"),
        (["--set", "density"], "field=value is expected"),
        (["--set", "density_pattern={bad"], "no valid JSON"),
        (["--target-modules", "("], "--target-modules (: a list of names, a name or regular expression"),
        (["--set", "allocation=fair"], "allocation='fair': one of 'numel', 'uniform', 'erk', 'global'"),
        (["--density", "3"], "--density 3.0: a share in (0, 1]"),
        (["--optimizer", "lion"], "one of 'adamw', 'adamw8bit', 'sgd'"),
        (["--base", "int3"], "--base int3: one of"),
        (["--device", "tpu!"], "--device tpu!:"),
        (["--batch", "0"], "--batch 0: an int of at least 1"),
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
    for change in ({"hidden_size": "wide"}, {"num_attention_heads": 0}, {"vocab_size": -1}, {"hidden_act": "none"}):
        bad.write_text(json.dumps({**LLAMA_7B, "num_hidden_layers": 1, **change}))
        assert run("plan", bad, "--flops", "1e12", "--json", expect=None).said["error"]["message"], change
    missing = run("plan", world / "base", "--target-modules", "nothing", expect=1)
    assert "match no layer" in missing.err or "not found" in missing.err
