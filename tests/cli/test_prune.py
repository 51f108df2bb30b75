"""The commands prune and curve: they call the library, and write what it made."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sparse_peft.cli.texts import batches_of, perplexity
from sparse_peft.sparsify import Masks, load_sparse, masks_of, prune

TEXT = "In the beginning God created the heaven and the earth. " * 60


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def test_a_pruned_model_is_the_librarys(run, stand_in, text, tmp_path):
    out = tmp_path / "out"
    arguments = ["--pattern", "2:4", "--score", "wanda", "--calibration", text, "--length", 32, "--sequences", 6]
    said = run("prune", stand_in, out, *arguments, "--exclude-modules", "k_proj,v_proj", "--json").said
    assert said["density"] == 0.5 and said["score"] == "wanda" and said["output"] == str(out)
    assert {"model.safetensors", "masks.safetensors", "tokenizer.json"} <= set(said["files"])
    reference = load(stand_in)
    data = batches_of(text, stand_in, 32, 6)
    assert [len(batch["input_ids"]) for batch in data] == [4, 2]
    masks = prune(reference, "2:4", "wanda", calibration=data, exclude_modules=["k_proj", "v_proj"], progress=False)
    assert said["layers"] == dict.fromkeys(masks.layers, 0.5)
    pruned = load(out)
    for name, tensor in reference.state_dict().items():
        assert torch.equal(pruned.state_dict()[name], tensor), name
    assert not Masks.load(out / "masks.safetensors").broken(pruned)


def test_a_model_is_written_without_its_zeros(run, stand_in, tmp_path):
    out = tmp_path / "out"
    said = run("prune", stand_in, out, "--pattern", "0.8", "--layout", "bitmask", "--json").said
    assert "sparse.safetensors" in said["files"] and "model.safetensors" not in said["files"]
    expected, read = load(stand_in), AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(out))
    prune(expected, 0.8, progress=False)
    assert load_sparse(read, out / "sparse.safetensors").kept == masks_of(expected).kept
    assert all(torch.equal(tensor, read.state_dict()[name]) for name, tensor in expected.state_dict().items())


def test_people_see_the_layers_of_which_least_stays(run, stand_in, tmp_path):
    out = run("prune", stand_in, tmp_path / "out", "--pattern", "0.6", "--allocation", "erk").out
    assert "Least kept (10 of 14 layers)" in out and "mlp.down_proj" in out and "40 %" in out


def test_a_curve_is_that_of_the_perplexity(run, stand_in, text, tmp_path):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "curve.png"
    arguments = ["--grid", "2:4,0.25", "--length", 32, "--sequences", 5, "--plot", plot]
    said = run("curve", stand_in, text, *arguments, "--json").said
    data = batches_of(text, stand_in, 32, 5)
    model = load(stand_in)
    assert said["dense"] == pytest.approx(perplexity(model, data)) and plot.is_file()
    prune(model, 0.25, progress=False)
    assert [round(point["sparsity"], 6) for point in said["points"]] == [0.25, 0.5]
    assert said["points"][0]["metric"] == pytest.approx(perplexity(model, data))
    assert said["points"][0]["random"] is not None and 0 <= said["knee"] <= 0.5
    assert "exists already" in run("curve", stand_in, text, *arguments, "--json", expect=2).said["error"]["message"]
    shown = run("curve", stand_in, text, "--grid", "0.25", "--length", 32, "--no-baseline", "--sequences", 2).out
    assert "knee, within 1 % of the dense model" in shown and "25 %" in shown


def test_perplexity_weighs_sequences_alike(stand_in, text):
    model, data = load(stand_in), batches_of(text, stand_in, 24, 6)
    whole = torch.cat([batch["input_ids"] for batch in data])
    assert perplexity(model, data) == pytest.approx(float(model(input_ids=whole, labels=whole).loss.detach().exp()))


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["--pattern", "half"], 2, "a share of zeros such as 0.5, or n:m such as '2:4'"),
        (["--pattern", "1.5"], 2, "a share of zeros"),
        (["--refine", "armor", "--pattern", "2:4"], 2, "cannot hold its layers; use --layout"),
        (["--layout", "coo"], 2, "--layout"),
        (["--score", "wanda"], 2, "needs data: pass --calibration"),
        (["--score", "wand"], 2, "did you mean 'wanda'"),
        (["--score", "wanda", "--calibration", "TEXT", "--length", "100000"], 2, "too few for one sequence"),
        (["--score", "wanda", "--calibration", "nowhere.txt"], 2, "nowhere.txt: no text file"),
    ],
)
def test_requests_that_make_no_sense_write_nothing(run, stand_in, text, tmp_path, arguments, code, message):
    arguments = [str(text) if argument == "TEXT" else argument for argument in arguments]
    said = run("prune", stand_in, tmp_path / "out", *arguments, "--json", expect=code).said
    assert message in said["error"]["message"], json.dumps(said)
    assert not (tmp_path / "out").exists() and list(tmp_path.iterdir()) == [text]
