"""The other commands: what they say to people and to programs, and what they refuse."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, ShiraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import sparse_peft.cli.compose
import sparse_peft.cli.merge
import sparse_peft.ops.products as products
from _sparse_peft_startup import command
from _sparse_peft_startup.commands import app
from sparse_peft import SketchConfig, SnellaConfig, SparseConfig, doctor
from sparse_peft.adapters import compare, summarise
from sparse_peft.adapters.delta_matrix import DeltaMatrix
from sparse_peft.adapters.offline_adapter import read_stored
from sparse_peft.tuners.delta_layer import TunerLayer
from tests.helpers.processes import run_module


def dense_deltas(world, name):
    """``{layer: delta}`` of a real model, as maps from inputs to outputs, float64."""
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(world / "base"), world / name)
    layers = [module for module in model.modules() if isinstance(module, TunerLayer)]
    return {layer.name: layer.get_delta_weight("default").detach().double() for layer in layers}


@pytest.mark.parametrize("name", ["sparse", "s2ft", "sora", "sltrain"])
def test_inspect_says_what_the_deltas_are(world, name):
    found, deltas = summarise(world / name), dense_deltas(world, name)
    assert {layer.layer for layer in found.layers} == deltas.keys()
    for layer in found.layers:
        delta = deltas[layer.layer]
        assert layer.shape == list(delta.shape)
        assert layer.norm == pytest.approx(float(delta.norm()), rel=1e-5)
        if name in ("sparse", "s2ft"):
            mask = delta != 0
            assert layer.entries == int(mask.sum()) and layer.zeros == 0 and layer.rank is None
            assert layer.largest == pytest.approx(float(delta.abs().max()))
            assert (layer.rows, layer.cols) == (int(mask.any(1).sum()), int(mask.any(0).sum()))
            by_row = mask.sum(1).sort(descending=True).values
            assert layer.row_share == pytest.approx(float(by_row[: -(-len(by_row) // 10)].sum() / mask.sum()))
        else:
            assert layer.rank == 3 and layer.alive == 3
    assert found.norm == pytest.approx(float(torch.cat([d.flatten() for d in deltas.values()]).norm()), rel=1e-5)
    assert found.parameters == sum(
        p.numel() for s in read_stored(world / name).states.values() for p in s.parameters()
    )


@pytest.mark.parametrize("pair", [("sparse", "other"), ("sparse", "s2ft"), ("sparse", "sltrain"), ("sora", "sltrain")])
def test_compare_is_dense_arithmetic(world, pair):
    found = compare(world / pair[0], world / pair[1])
    first, second = dense_deltas(world, pair[0]), dense_deltas(world, pair[1])
    assert {layer.layer for layer in found.layers} == first.keys() & second.keys()
    for layer in found.layers:
        a, b = first[layer.layer], second[layer.layer]
        assert layer.cosine == pytest.approx(float((a * b).sum() / a.norm() / b.norm()), abs=1e-6)
        assert layer.difference == pytest.approx(float((a - b).norm()), rel=1e-5)
        if layer.jaccard is not None and "sltrain" not in pair:
            either = (a != 0) | (b != 0)
            assert layer.common == int(((a != 0) & (b != 0)).sum())
            assert layer.jaccard == pytest.approx(layer.common / int(either.sum()))
    names = first.keys() | second.keys()
    zero = torch.zeros(1, dtype=torch.float64)
    square = sum(float((first.get(n, zero) - second.get(n, zero)).square().sum()) for n in names)
    assert found.difference == pytest.approx(square**0.5, rel=1e-5)
    assert set(found.only_a) == first.keys() - second.keys() and not found.identical


def test_inner_products_of_every_pair_of_forms(world):
    states = {name: read_stored(world / name).states for name in ("sparse", "sora", "sltrain")}
    dense = {name: dense_deltas(world, name) for name in states}
    layer = next(iter(states["sora"]))
    for a in states:
        for b in states:
            expected = float((dense[a][layer] * dense[b][layer]).sum())
            found = DeltaMatrix(states[a][layer]).inner(DeltaMatrix(states[b][layer]))
            assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_inspect_for_people_and_programs(world, run, tmp_path):
    out = run("inspect", world / "sparse").out
    assert "0.mlp.down_proj" in out and "48x80" in out and "top rows" in out and "density=0.1" in out
    assert "rank" in run("inspect", world / "sora").out
    said = run("inspect", world / "sparse", "--plot", tmp_path / "map.png", "--json").said
    assert said["plot"] == str(tmp_path / "map.png") and (tmp_path / "map.png").stat().st_size > 10_000
    assert said["layers"][0].keys() >= {"layer", "shape", "entries", "density", "norm", "row_share"}
    assert "exists already" in run("inspect", world / "sparse", "--plot", tmp_path / "map.png", expect=2).err
    run("inspect", world / "sparse", "--plot", tmp_path / "map.png", "--force")
    refused = run("inspect", world / "sora", "--plot", tmp_path / "none.png", expect=1)
    assert "no positions" in refused.err and not (tmp_path / "none.png").exists()


def test_inspect_shows_kinds_of_many_layers(world, run, monkeypatch):
    monkeypatch.setattr("sparse_peft.cli.inspect.MOST_LISTED", 13)
    out, listed = run("inspect", world / "sparse").out, run("inspect", world / "sparse", "--layers").out
    assert "\n0.mlp.down_proj" in listed and "--layers" not in listed and "\n0.mlp.down_proj" not in out
    deltas = {n: d for n, d in dense_deltas(world, "sparse").items() if n.endswith("mlp.down_proj")}
    (row,) = [line.split() for line in out.splitlines() if line.startswith("mlp.down_proj")]
    entries = sum(int((d != 0).sum()) for d in deltas.values())
    norm, largest = (
        torch.stack([d.norm() for d in deltas.values()]).norm(),
        max(d.abs().max() for d in deltas.values()),
    )
    assert row[1:4] == ["2", "48x80", f"{entries:,}"] and row[-2:] == [f"{norm:.3g}", f"{largest:.3g}"]


def test_compare_for_people_and_programs(world, run):
    out = run("compare", world / "sparse", world / "other").out
    assert "density: 0.1 | 0.05" in out and "only in A" in out and "all layers" in out
    said = run("compare", world / "sparse", world / "sparse", "--json").said
    assert said["identical"] and said["jaccard"] == 1 and said["cosine"] == pytest.approx(1) and not said["settings"]
    assert "identical" in run("compare", world / "sparse", world / "sparse").out


def logits(model):
    return model(torch.arange(12)[None]).logits.detach()


def test_merge(world, run, tmp_path):
    said = run("merge", world / "base", world / "sparse", tmp_path / "merged", "--json").said
    assert said["copied"] == ["tokenizer.json"] and "model.safetensors" in said["files"]
    expected = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(world / "base"), world / "sparse").eval()
    torch.testing.assert_close(
        logits(LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()), logits(expected), rtol=0, atol=0
    )
    assert "exists already; --force" in run("merge", world / "base", world / "s2ft", tmp_path / "merged", expect=2).err
    assert "model.safetensors" in run("merge", world / "base", world / "s2ft", tmp_path / "merged", "--force").out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged"]


def test_extract_finds_what_was_merged(world, run, tmp_path):
    run("merge", world / "base", world / "sparse", tmp_path / "tuned")
    said = run("extract", world / "base", tmp_path / "tuned", tmp_path / "ex", "--density", "0.1", "--json").said
    assert said["kept"] == pytest.approx(1) and said["entries"] > 0
    assert compare(world / "sparse", tmp_path / "ex").cosine == pytest.approx(1, abs=1e-5)
    assert (
        "of the squared difference"
        in run("extract", world / "base", tmp_path / "tuned", tmp_path / "ex2", "--density", "0.01").out
    )
    assert "exactly one of" in run("extract", world / "base", tmp_path / "tuned", tmp_path / "ex3", expect=2).err


def test_export(world, run, tmp_path):
    lora_form = "--form", "lora", "--base", world / "base"
    said = run("export", world / "s2ft", tmp_path / "lora", *lora_form, "--json").said
    assert said["error"] == 0 and set(said["ranks"].values()) == {10, 16}
    lora = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(world / "base"), tmp_path / "lora").eval()
    own = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(world / "base"), world / "s2ft").eval()
    torch.testing.assert_close(logits(lora), logits(own), rtol=1e-4, atol=1e-4)
    out = run("export", world / "sparse", tmp_path / "low", "--form", "low_rank", "--rank", "4").out
    assert "what is missing of the adapter" in out
    assert "no LoRA" in run("export", world / "sltrain", tmp_path / "m", *lora_form, expect=1).err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora", "low"]


def test_export_merges_by_default(world, run, tmp_path):
    said = run("export", world / "sparse", tmp_path / "exported", "--json").said
    merged = run("merge", world / "base", world / "sparse", tmp_path / "merged", "--json").said
    same = "bytes", "files", "copied"
    assert said["form"] == "merged" and {key: said[key] for key in same} == {key: merged[key] for key in same}
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("exported", "merged")]
    assert files[0] == files[1]
    refused = run("export", world / "sparse", tmp_path / "lora", "--form", "lora", expect=1).err
    assert "more than the merged model" in refused and "--form merged" in refused
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exported", "merged"]


@pytest.mark.parametrize("config", [SketchConfig(bits=2), SnellaConfig(r=4)], ids=["sketch", "snella"])
def test_export_as_lora_of_methods_without_factors(world, run, tmp_path, config):
    config = copy.deepcopy(config)
    config.target_modules, config.init_weights = ["q_proj", "down_proj"], False
    get_peft_model(LlamaForCausalLM.from_pretrained(world / "base"), config).save_pretrained(tmp_path / "adapter")
    arguments = "export", tmp_path / "adapter", tmp_path / "lora", "--form", "lora", "--base", world / "base"
    if isinstance(config, SnellaConfig):
        assert run(*arguments, "--json").said["error"] == 0
    else:
        said = " ".join(run(*arguments, expect=1).err.split())
        assert "no LoRA form because its tables change every weight; merge it into the base model" in said
        assert not (tmp_path / "lora").exists()


def test_compose(world, run, tmp_path):
    adapters = world / "sparse", world / "other"
    said = run("compose", *adapters, tmp_path / "sum", "--weights", "0.5,2", "--json").said
    first, second, found = (dense_deltas(world, name) for name in ("sparse", "other", tmp_path / "sum"))
    for name, delta in found.items():
        torch.testing.assert_close(
            delta, 0.5 * first[name] + 2 * second.get(name, torch.zeros(())), rtol=1e-6, atol=1e-6
        )
    assert said["output"] == said["folder"] == str(tmp_path / "sum") and len(said["layers"]) == len(first)
    out = run("compose", *adapters, tmp_path / "ties", "--combination", "ties", "--density", "0.5").out
    assert "0.mlp.down_proj" in out
    assert "2 adapters" in run("compose", *adapters, tmp_path / "x", "--weights", "1", expect=2).err
    assert "a density" in run("compose", *adapters, tmp_path / "x", "--combination", "ties", expect=2).err
    assert "low-rank" in run("compose", world / "sparse", world / "sora", tmp_path / "x", expect=1).err


def test_convert(world, run, tmp_path):
    out = run("convert", world / "sparse", tmp_path / "shira", "--to", "shira").out
    assert "SHIRA" in out
    shira = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(world / "base"), tmp_path / "shira")
    assert isinstance(shira.peft_config["default"], ShiraConfig)
    said = run("convert", tmp_path / "shira", tmp_path / "back", "--base", world / "base", "--json").said
    assert said["peft_type"] == "SPARSE_PEFT_DELTA"
    assert compare(world / "sparse", tmp_path / "back").difference == 0
    assert "one of sparse, shira" in run("convert", world / "sparse", tmp_path / "x", "--to", "lora", expect=2).err


def test_pickles_are_refused_with_a_sentence(world, run, tmp_path):
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "adapter_config.json").write_bytes((world / "sparse" / "adapter_config.json").read_bytes())
    torch.save(load_file(world / "sparse" / "adapter_model.safetensors"), pickled / "adapter_model.bin")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_bytes((world / "base" / "config.json").read_bytes())
    torch.save({}, model / "pytorch_model.bin")
    for arguments in (
        ["inspect", pickled],
        ["compare", world / "sparse", pickled],
        ["merge", world / "base", pickled, tmp_path / "out"],
        ["merge", model, world / "sparse", tmp_path / "out"],
        ["export", pickled, tmp_path / "out"],
        ["compose", world / "sparse", pickled, tmp_path / "out"],
        ["extract", world / "base", model, tmp_path / "out", "--density", "0.1"],
        ["convert", pickled, tmp_path / "out"],
    ):
        assert "pickle" in run(*arguments, expect=2).err, arguments
    assert not (tmp_path / "out").exists()


MISTYPED = {
    "prune BASE OUT --pattern 2:x": "--pattern 2:x: a share of zeros",  # and no picture in the place of :x:
    "prune BASE OUT --score wnda": "did you mean 'wanda'?",
    "prune BASE OUT --score wanda": "needs data: pass --calibration",
    "prune BASE OUT --allocation unifrom": "did you mean 'uniform'?",
    "prune BASE OUT --refine dsnott": "did you mean 'dsnot'?",
    "prune BASE OUT --pattern 2:4 --allocation erk": "has its own count in every layer",
    "prune BASE OUT --dtype floa32": "did you mean 'float32'?",
    "prune BASE OUT --device cudda": "--device cudda: cpu or cuda is expected",
    "prune BASE OUT --device cuda:99": "--device cuda:99: cpu or cuda is expected, and present here",
    "curve BASE TEXT --score wnda": "did you mean 'wanda'?",
    "curve BASE TEXT --allocation globl": "did you mean 'global'?",
    "curve BASE TEXT --grid 0.5,2:4 --allocation erk": "has its own count in every layer",
    "curve BASE TEXT --dtype flot": "did you mean 'float32'?",
    "convert ADAPTER OUT --others drop": "one of 'leave_out', 'save', 'refuse' is expected",
    "compose ADAPTER ADAPTER OUT --weights 1,x": "--weights 1,x: numbers with commas are expected",
    "serve BASE --dtype flot": "did you mean 'float32'?",
    "serve BASE --device cudda": "--device cudda: cpu or cuda is expected",
    "eval ADAPTER --tasks x --limit 0": "Invalid value for '--limit'",
    "eval ADAPTER --tasks x --batch-size 0": "Invalid value for '--batch-size'",
    "eval ADAPTER --tasks ,": "the name of a task",
    "eval ADAPTER --tasks x --include-path none": "--include-path none: no such folder",
    "eval ADAPTER --tasks x --dtype flot": "did you mean 'float32'?",
}


@pytest.mark.parametrize("request_", MISTYPED)
def test_a_mistyped_request_is_usage_before_a_model_is_loaded(world, run, tmp_path, monkeypatch, request_):
    name = request_.partition(" ")[0]
    for module in {"eval": ["lm_eval"], "serve": ["starlette", "uvicorn"]}.get(name, []):
        pytest.importorskip(module)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    (tmp_path / "text").write_text("In the beginning. " * 400)
    places = {"BASE": world / "base", "ADAPTER": world / "sparse", "OUT": tmp_path / "out", "TEXT": tmp_path / "text"}
    said = run(*(places.get(part, part) for part in request_.split()), "--json", expect=2).said
    assert said["command"] == name and said["error"]["kind"] == "usage"
    assert MISTYPED[request_] in said["error"]["message"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [("none", "no such folder"), ("base", "it is a model's folder"), (".", "there are adapters in it")],
)
def test_what_is_no_adapter(world, run, name, words):
    for arguments in (["inspect", world / name], ["compare", world / "sparse", world / name]):
        done = run(*arguments, "--json", expect=2)
        assert words in done.said["error"]["message"]


def test_adapters_of_other_methods_are_no_adapters_here(world, run, tmp_path):
    model = get_peft_model(LlamaForCausalLM.from_pretrained(world / "base"), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "lora")
    (tmp_path / "empty").mkdir()
    for arguments in (
        ["inspect", tmp_path / "lora"],
        ["compare", world / "sparse", tmp_path / "lora"],
        ["export", tmp_path / "lora", tmp_path / "out", "--base", world / "base"],
        ["merge", world / "base", tmp_path / "lora", tmp_path / "out"],
        ["compose", world / "sparse", tmp_path / "lora", tmp_path / "out"],
        ["convert", tmp_path / "lora", tmp_path / "out"],
        ["inspect", tmp_path / "empty"],
        ["convert", tmp_path / "empty", tmp_path / "out"],
    ):
        assert run(*arguments, "--json", expect=2).said["error"]["kind"] == "usage", arguments
    assert not (tmp_path / "out").exists()


def test_a_damaged_adapter_is_a_problem_and_not_usage(world, run, tmp_path):
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (damaged / name).write_bytes((world / "sparse" / name).read_bytes())
    with (damaged / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(1000)
    assert "damaged" in run("inspect", damaged, expect=1).err
    wrong = json.loads((world / "sparse" / "adapter_config.json").read_text())
    (damaged / "adapter_config.json").write_text("{" + json.dumps(wrong))
    assert run("inspect", damaged, "--json", expect=1).said["error"]["kind"] == "problem"


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("failure", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failure_midway_leaves_what_was_there(world, tmp_path, monkeypatch, existing, failure):
    out = tmp_path / "out"
    if existing:
        out.mkdir()
        (out / "mine").write_text("kept")

    def fail(adapter, staging, *args, **kwargs):
        (staging / "half").write_text("x")
        raise failure

    monkeypatch.setattr(sparse_peft.cli.merge, "export", fail)

    arguments = ["merge", str(world / "base"), str(world / "sparse"), str(out), *(["--force"] if existing else [])]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code != 0
    assert sorted(path.name for path in tmp_path.iterdir()) == (["out"] if existing else [])
    if existing:
        assert [path.name for path in out.iterdir()] == ["mine"]


def test_outputs_are_refused_before_the_work(world, run, tmp_path, monkeypatch):
    monkeypatch.setattr(sparse_peft.cli.compose, "compose_adapters", lambda *_, **__: pytest.fail("it worked"))
    adapters = world / "sparse", world / "other"
    assert "does not exist" in run("compose", *adapters, tmp_path / "a" / "b", expect=2).err
    (tmp_path / "file").write_text("x")
    assert "exists already" in run("compose", *adapters, tmp_path / "file", expect=2).err
    assert "a file" in run("compose", *adapters, tmp_path / "file", "--force", expect=2).err


def test_doctor_takes_the_triton_of_an_older_torch(monkeypatch):
    needs = {"torch": ["triton==3.2.0; platform_system == 'Linux'"], "sparse-peft": ["triton>=3.9; extra == 'test'"]}
    monkeypatch.setattr(doctor.metadata, "requires", needs.get)
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "3.2.0")
    assert [check.status for check in doctor._packages() if check.name == "triton"] == [doctor.OK]
    needs["torch"] = []
    assert [check.status for check in doctor._packages() if check.name == "triton"] == [doctor.BROKEN]


def test_doctor(run, monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSE_PEFT_CACHE", str(tmp_path / "cache"))
    said = run("doctor", "--json").said
    found = {check["name"]: check for check in said["checks"]}
    assert said["healthy"] and found["torch"]["note"].startswith(">=") and found["trial"]["status"] == "ok"
    assert found["calibration"]["status"] == "absent" and found["cpu float32 gradients"]["found"].startswith("sampled")
    assert {check["group"] for check in said["checks"]} == set(doctor.GROUPS)
    out = run("doctor").out
    assert "nothing is broken" in out and "SPARSE_PEFT_CACHE" in out
    monkeypatch.setenv("SPARSE_PEFT_BACKEND", "abacus")
    broken = run("doctor", "--json", expect=1).said
    assert not broken["healthy"]
    assert any(check["status"] == "broken" and "SPARSE_PEFT_BACKEND" in check["name"] for check in broken["checks"])
    monkeypatch.delenv("SPARSE_PEFT_BACKEND")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "calibration.json").write_text("[")
    assert "broken: calibration" in run("doctor", expect=1).out


def test_doctor_knows_old_and_missing_packages(monkeypatch):
    real = doctor.metadata.version
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "0.1" if name == "peft" else real(name))
    (peft,) = [check for check in doctor._packages() if check.name == "peft"]
    assert peft.status == "broken" and "is needed" in peft.note

    def absent(name):
        if name in ("trl", "accelerate"):
            raise doctor.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(doctor.metadata, "version", absent)
    found = {check.name: check for check in doctor._packages()}
    assert found["trl"].status == "absent" and found["accelerate"].status == "broken"


def test_doctor_finds_a_wrong_gradient(monkeypatch):
    real = products.observed_support_grad
    monkeypatch.setattr(products, "observed_support_grad", lambda *args, **kwargs: 1.01 * real(*args, **kwargs))
    assert "not the dense one's" in doctor._trial().found


def test_as_a_program(world, tmp_path):
    """stdout holds one JSON object and nothing else; codes leave the process."""
    command = ["sparse_peft.cli", "merge", world / "base", world / "sparse", tmp_path / "merged", "--json"]
    done = run_module(*command)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["command"] == "merge"
    done = run_module(*command)
    assert done.returncode == 2 and json.loads(done.stdout)["error"]["kind"] == "usage"


def test_without_typer_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "rich" else object())
    with pytest.raises(SystemExit) as exit_:
        command.main()
    assert exit_.value.code == 2 and 'rich on the command line: pip install ".[cli]"' in capsys.readouterr().err


def test_an_adapter_for_another_base_is_named(world, run, tmp_path):
    small = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4
    )
    model = get_peft_model(LlamaForCausalLM(small), SparseConfig(target_modules="all-linear"))
    model.save_pretrained(tmp_path / "small")
    done = run("compare", world / "sparse", tmp_path / "small", expect=1)
    assert "different base models" in done.err and "layer model.layers.0" in done.err
