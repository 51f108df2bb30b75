"""The benchmark of R-Sparse, whole, on tiny layers and a tiny model."""

from __future__ import annotations

import json

import pytest

from benchmarks import held_out, rsparse
from tests.benchmarks.test_sketch import blocks, run, tiny


def test_layers_and_a_model_are_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(rsparse, "SHAPES", ((16, 24),))
    monkeypatch.setattr(rsparse, "COLD_BYTES", 4000)
    run(rsparse, "--rounds", "2", "--out", str(tmp_path / "speed.json"))
    rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert len(rows) == 4 and all(row["decode"] > 0 and row["prompt"] > 0 for row in rows)

    monkeypatch.setattr(held_out, "load_model", tiny)
    monkeypatch.setattr(held_out, "load_tokenizer", lambda: None)
    monkeypatch.setattr(held_out, "kjv_blocks", blocks)
    arguments = ["--quality", "--sparsity", "0.4", "--calibration", "8", "--held-out", "4", "--length", "24"]
    run(rsparse, *arguments, "--out", str(tmp_path / "quality.json"))
    found = json.loads((tmp_path / "quality.json").read_text())
    assert [row["way"] for row in found["rows"]] == list(rsparse.WAYS)
    assert all(row["saved"] == pytest.approx(0.4, abs=0.05) for row in found["rows"])
    assert all(row["loss"] != found["dense_loss"] for row in found["rows"])
