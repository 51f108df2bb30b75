"""The benchmark of recipes, whole, on a tiny model."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import held_out, recipes
from benchmarks.held_out import HeldOut
from tests.benchmarks.test_sketch import blocks, run, tiny


@pytest.fixture
def tiny_model(monkeypatch):
    monkeypatch.setattr(held_out, "load_model", tiny)
    monkeypatch.setattr(held_out, "load_tokenizer", lambda: None)
    monkeypatch.setattr(held_out, "kjv_blocks", blocks)


@pytest.mark.slow
def test_recipes_are_measured_and_keep_their_zeros(tmp_path, tiny_model):
    path = tmp_path / "results.json"
    ways = ("static", "static, released", "cast", "ast, slorb", "dsee")
    only = [part for way in ways for part in ("--only", way)]
    arguments = ["--train", "8", "--held-out", "8", "--length", "24", "--blocks", "1", "--steps", "4", "--seeds", "1"]
    run(recipes, *arguments, *only, "--out", str(path))
    found = json.loads(path.read_text())
    rows = {(row["way"], row["setting"]): row for row in found["rows"]}
    kinds = ("alone, seed 0", "distilled, seed 0")
    assert set(rows) == {(way, kind) for way in ways for kind in kinds}
    fills = {"static, released", "ast, slorb", "dsee"}
    for (way, _), row in rows.items():
        assert row["wanted"] == pytest.approx(0.75, abs=1e-3)
        assert row["merge_error"] < 1e-5
        if way in fills:
            assert row["filled"] > 0
        else:
            assert row["filled"] == 0 and row["zeros"] == pytest.approx(row["wanted"], abs=1e-6)
    before = path.read_bytes()
    run(recipes, *arguments, *only, "--out", str(path))  # nothing is left to measure
    assert path.read_bytes() == before
    assert all(rows[way, kinds[0]]["loss"] != rows[way, kinds[1]]["loss"] for way in ways)


def test_the_upper_blocks_compute_what_the_whole_model_does(tiny_model):
    whole = HeldOut.load(8, 8, 24)
    dense = whole.dense_loss
    upper = recipes.Upper.above(whole, 1)
    assert len(upper.model.model.layers) == 1
    assert upper.dense_loss == pytest.approx(dense, abs=1e-6)
    assert len(upper.data) == 8 and torch.equal(upper.data[3]["labels"], whole.data[0]["input_ids"][3:4])
