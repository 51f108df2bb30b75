"""The command plan: what people read, what programs read, what is refused."""

import json
import resource
import time
from dataclasses import replace
from functools import partial

import pytest
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from rich.console import Console

from sparse_peft import SparseConfig, structure
from sparse_peft.cli.output import count_text
from sparse_peft.cli.plan import show
from sparse_peft.planning import GPU_SIZES, Need, PlanOptions, plan_training
from sparse_peft.structure import read_model_config

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


def test_gpu_sizes_and_a_limit_of_memory(tmp_path, run):
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA_7B, "num_hidden_layers": 4}))
    plan = ("plan", tmp_path, "--target-modules", "all-linear", "--flops", "1e14")
    said = run(*plan, "--memory", "8", "--json").said
    for need in said["needs"]:
        fitting = [size for size in GPU_SIZES if need["peak_bytes"] <= size * 1e9]
        assert need["smallest_gpu"] == fitting[0], need["name"]
    assert said["memory"] == 8 and said["over_memory"] == ["full"]
    out = run(*plan, "--memory", "8").out
    assert "over 8 GB: full by " in out and "--base nf4, --checkpointing" in out and "\x1b" not in out
    assert "all of them stay below 100 GB" in run(*plan, "--memory", "100").out
    total = next(line.split() for line in out.splitlines() if line.startswith("all "))
    assert total[1] == "28" and total[2] == count_text(said["needs"][0]["trained"]).split()[0]
    assert run(*plan, "--json").said["over_memory"] == []


def test_a_peak_beyond_every_gpu_or_without_activations_names_none():
    fields = dict.fromkeys(("share", "trained_bytes", "position_bytes", "gradient_bytes", "optimizer_bytes"), 0)
    need = Need(name="x", trained=1, base_bytes=8 * 10**9, activation_bytes=0, temporary_bytes=0, file_bytes=0,
                flops=None, seconds=None, **fields)  # fmt: skip
    assert need.smallest_gpu == 8 and replace(need, base_bytes=8 * 10**9 + 1).smallest_gpu == 16
    assert replace(need, base_bytes=142 * 10**9).smallest_gpu is None
    assert replace(need, activation_bytes=None).smallest_gpu is None


def test_what_is_over_the_limit_is_red_and_totals_are_bold_on_a_terminal(world):
    options = PlanOptions(flops=1e9)
    plan = plan_training(read_model_config(world / "base"), SparseConfig(target_modules="all-linear"), options)
    console = Console(force_terminal=True, width=120, highlight=False, color_system="standard")
    with console.capture() as captured:
        show(console, plan, memory=1e-9)
    lines = captured.get().splitlines()
    peak = next(line for line in lines if "peak (estimate)" in line)
    assert peak.count("\x1b[1;31m") == 3, "three ways of training, bold and red"
    assert "\x1b[31m" not in next(line for line in lines if "activations" in line)
    assert any("╭─" in line and "What trains" in line for line in lines), "a panel like those of --help"


def test_a_name_on_the_hub(tmp_path, world, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    missing = run("plan", "someone/some-model", "--json", expect=2)
    assert missing.said["error"]["kind"] == "usage"
    assert "not in the Hub's cache, while HF_HUB_OFFLINE forbids downloads" in missing.said["error"]["message"]
    snapshot = tmp_path / "hub" / "models--someone--some-model"
    (snapshot / "refs").mkdir(parents=True)
    (snapshot / "refs" / "main").write_text("1" * 40)
    (snapshot / "snapshots" / ("1" * 40)).mkdir(parents=True)
    (snapshot / "snapshots" / ("1" * 40) / "config.json").write_text((world / "base" / "config.json").read_text())
    monkeypatch.setattr(structure, "hf_hub_download", partial(hf_hub_download, cache_dir=tmp_path / "hub"))
    said = run("plan", "someone/some-model", "--density", "0.02", "--flops", "1e9", "--json").said
    assert said["architecture"] == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (RuntimeError, "cannot be reached"),  # of an HTTP client
        (LocalEntryNotFoundError, "cannot be reached"),
        (RepositoryNotFoundError, "the Hub has no such model, or it is private"),
        (GatedRepoError, "on request only"),
        (EntryNotFoundError, "has no config.json"),
    ],
)
def test_why_the_hub_gives_nothing(tmp_path, run, monkeypatch, kind, words):
    def fail(*args, **kwargs):
        raise kind.__new__(kind)  # their constructors want a response of the HTTP client

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(structure, "model_info", fail)
    done = run("plan", "someone/some-model", expect=2)
    assert words in " ".join(done.err.split()) and "Traceback" not in done.err


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
