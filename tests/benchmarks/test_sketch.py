"""The benchmarks of sketches: bits counted exactly, and whole runs on a tiny model."""

from __future__ import annotations

import json
import math

import pytest
import torch
import typer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from benchmarks import held_out, sketch, sketch_layers, sketch_tuning
from sparse_peft.ops import code_gather


def tiny() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=53,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def blocks(tokenizer, length, split="train", limit=None):
    generator = torch.Generator().manual_seed(len(split))
    # a walk with steps of a few sizes: something to learn
    steps = torch.randint(1, 4, (limit, length), generator=generator)
    return steps.cumsum(1).remainder(53).tolist()


@pytest.fixture
def tiny_model(monkeypatch):
    for module in (held_out, sketch_layers, sketch_tuning):
        monkeypatch.setattr(module, "load_model", tiny)
        monkeypatch.setattr(module, "load_tokenizer", lambda: None)
        monkeypatch.setattr(module, "kjv_blocks", blocks)


def run(module, *arguments):
    app = typer.Typer()
    app.command()(module.main)
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output + repr(result.exception)


# per row of 64 and of 128 inputs; weights with 128 inputs are a fifth of all
@pytest.mark.parametrize(
    "way, bits, expected",
    [
        ("round to nearest", 4, lambda cols: 4 + 32 / cols),
        ("round to nearest, blocks of 64", 3, lambda cols: 3 + 32 / 64),
        ("NF4, blocks of 64", 4, lambda cols: 4 + (8 + 32 / 256) / 64),
        ("k-means", 4, lambda cols: 4 + 16 * 16 / cols),
        ("k-means, 2 groups", 2, lambda cols: 2 + 2 * 4 * 16 / cols),
        ("k-means, compensated, refit", 3, lambda cols: 3 + 8 * 16 / cols),
    ],
)
def test_bits_are_counted_with_all_that_is_stored(way, bits, expected):
    model, data = tiny(), held_out.as_batches(blocks(None, 16, limit=16), 8)
    sizes = [module.weight.shape for module in sketch.targets_of(model).values()]

    sketches = sketch.sketches_of(model, sketch.WAYS[way], bits, data)

    total = sum(rows * cols * expected(cols) for rows, cols in sizes)
    weights = sum(rows * cols for rows, cols in sizes)
    assert sketch.bits_per_weight(sketches, sketch.WAYS[way]) == pytest.approx(total / weights, rel=1e-12)


def test_nf4_in_blocks_is_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    model = tiny()
    sketches = sketch.sketches_of(model, sketch.WAYS["NF4, blocks of 64"], 4, [])

    for name, module in sketch.targets_of(model).items():
        packed, state = functional.quantize_4bit(module.weight.data, blocksize=64, quant_type="nf4")
        expected = functional.dequantize_4bit(packed, state)
        found = sketches[name]
        decoded = code_gather(found.codebooks, found.codes, 4, found.cols, torch.float32)
        # tables that differ in the sixth digit move a weight in a thousand over a border
        assert ((decoded - expected).abs() < 1e-5).float().mean() > 0.998


def test_perplexities_of_all_ways(tmp_path, tiny_model):
    path = tmp_path / "perplexity.json"

    run(sketch, "--bits", "3", "--calibration", "16", "--held-out", "4", "--length", "32", "--out", str(path))

    found = json.loads(path.read_text())
    rows = {row["way"]: row for row in found["rows"]}
    assert list(rows) == list(sketch.WAYS)
    assert found["environment"]["versions"]["torch"] == torch.__version__
    for row in rows.values():
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
        assert abs(row["loss"] - found["dense_loss"]) > 1e-6  # the weights were written in other numbers
        assert 3 < row["bits_per_weight"] < 8
    assert rows["k-means"]["loss"] != rows["k-means, compensated, refit"]["loss"]


def test_the_models_weights_come_back():
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    unseen = blocks(None, 16, limit=2)

    with pytest.raises(IndexError, match="out of range"):
        sketch.quality(model, "k-means", 2, [], [[999] * 16])
    sketch.quality(model, "k-means", 2, [], unseen)

    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_tuning_runs_all_methods(tmp_path, tiny_model, monkeypatch):
    pytest.importorskip("bitsandbytes")
    path = tmp_path / "tuning.json"
    rates = {sketch_tuning.IN_PLACE: [1e-3, 3e-3], sketch_tuning.QLORA: [3e-3], sketch_tuning.ON_NF4: [3e-3]}
    monkeypatch.setattr(sketch_tuning, "LEARNING_RATES", rates)

    run(
        sketch_tuning, "--steps", "12", "--seeds", "1", "--calibration", "16", "--length", "32", "--held-out", "8",
        "--rank", "4", "--out", str(path),
    )  # fmt: skip

    found = json.loads(path.read_text())
    assert [run["method"] for run in found["runs"]] == list(sketch_tuning.METHODS)
    for trained in found["runs"]:
        assert trained["loss"] < trained["start"] and len(trained["curve"]) == 12
    memory = {cost["method"]: cost for cost in found["memory"]}
    rows, weights = 2 * (64 + 32 + 32 + 64 + 128 + 128 + 64), 2 * (64 * 64 * 2 + 64 * 32 * 2 + 64 * 128 * 3)
    assert memory[sketch_tuning.IN_PLACE]["trained"] == rows * 16 == memory[sketch_tuning.ON_NF4]["trained"]
    for cost in memory.values():
        assert cost["adapter"] == 4 * cost["trained"]
        assert 8 * cost["trained"] <= cost["optimizer"] < 8 * cost["trained"] + 4 * 1000
        assert cost["peak_extra"] > 0
    rest = 4 * (53 * 64 + 5 * 64)  # embedding and norms, in float32
    assert memory[sketch_tuning.QLORA]["base"] >= weights // 2 + rest
    assert memory[sketch_tuning.IN_PLACE]["base"] >= weights // 2 + rest
    assert memory[sketch_tuning.QLORA]["base"] < weights + rest


def test_output_errors_of_a_blocks_layers(tmp_path, tiny_model):
    path = tmp_path / "layers.json"

    run(
        sketch_layers, "--block", "1", "--rows", "24", "--calibration", "40", "--held-out", "8", "--length", "32",
        "--out", str(path),
    )  # fmt: skip

    rows = {(row["way"], row["bits"]): row for row in json.loads(path.read_text())["rows"]}
    assert set(rows) == {(way, bits) for way in sketch_layers.WAYS for bits in (4, 3, 2)}
    for row in rows.values():
        assert list(row["held_out"]) == sketch_layers.KINDS and all(0 < e < 2 for e in row["held_out"].values())
        assert row["mean"] == pytest.approx(math.prod(row["held_out"].values()) ** 0.25)
    for layer in sketch_layers.KINDS:  # what is guaranteed where the sketch was made
        errors = {way: rows[way, 3]["calibration"][layer] for way in sketch_layers.WAYS}
        assert errors["k-means, refit"] < errors["k-means"]
        assert errors["compensated, weighted, refit"] < errors["compensated, weighted"] < errors["k-means"]
