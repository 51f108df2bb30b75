"""The benchmark of pruning, whole, on a tiny model."""

from __future__ import annotations

import json

import pytest
import torch
import typer

from benchmarks import held_out, sparsify
from sparse_peft.sparsify import masks_of
from tests.benchmarks.test_sketch import blocks, run, tiny


@pytest.fixture
def tiny_model(monkeypatch):
    monkeypatch.setattr(held_out, "load_model", tiny)
    monkeypatch.setattr(held_out, "load_tokenizer", lambda: None)
    monkeypatch.setattr(held_out, "kjv_blocks", blocks)


def test_all_ways_and_patterns_are_measured(tmp_path, tiny_model):
    path = tmp_path / "results.json"
    run(sparsify, "--calibration", "24", "--held-out", "8", "--length", "24", "--out", str(path))
    found = json.loads(path.read_text())
    rows = {(row["way"], row["pattern"]): row for row in found["rows"]}
    assert set(rows) == {(w, p) for w in sparsify.WAYS for p in ("0.5", "0.6", "2:4") if sparsify.fits(w, p)}
    assert all(row["density"] == pytest.approx(0.4 if pattern == "0.6" else 0.5, abs=1e-4)
               for (_, pattern), row in rows.items())  # fmt: skip
    assert len({row["loss"] for row in found["rows"]}) > 15 and found["dense_loss"] > 0


def test_the_models_weights_come_back():
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(IndexError, match="out of range"):
        sparsify.quality(model, "magnitude", "0.5", [], [[999] * 16])
    sparsify.quality(model, "magnitude", "2:4", [], blocks(None, 16, limit=2))
    assert masks_of(model) is None
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_unknown_ways_are_refused():
    with pytest.raises(typer.BadParameter, match="some of 'random'"):
        sparsify.main(only=["wand"])
