"""The benchmark on digits, whole, with few steps on patterns in their place."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import digits
from tests.benchmarks.test_sketch import run


def patterns():
    """Ten pictures and noise: a few hundred for training, and some for the result."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.rand(10, 64, generator=generator)
    labels = torch.arange(360).remainder(10)
    data = pictures[labels] + 0.1 * torch.randn(360, 64, generator=generator), labels
    return data, (data[0][:60], labels[:60])


@pytest.fixture
def short(monkeypatch):
    train = digits.train
    monkeypatch.setattr(digits, "digits", patterns)
    monkeypatch.setattr(digits, "SEEDS", (0, 1))
    monkeypatch.setattr(digits, "RATES", (3e-2,))
    monkeypatch.setattr(digits, "CONFIGS", {"sparse": digits.CONFIGS["sparse"]})
    monkeypatch.setattr(digits, "FAMILIES", {name: digits.FAMILIES[name] for name in ("sparse", "sst")})
    monkeypatch.setattr(digits, "train", lambda *args, **options: train(*args, **options | {"steps": 3}))


@pytest.mark.slow
def test_all_experiments_are_run_once(tmp_path, short):
    path = tmp_path / "results.json"
    run(digits, "--out", str(path))
    found = json.loads(path.read_text())
    assert set(found["procedures"]) == {f"sparse, {name}" for name in digits.around(*[patterns()[0]] * 2)}
    assert all(row["rate"] == 3e-2 and row["learnt"]["std"] >= 0 for row in found["procedures"].values())
    assert found["families"]["sparse"] == found["procedures"]["sparse, none"]
    assert found["families"]["sst"]["trained"] > found["families"]["sparse"]["trained"]
    assert len(found["tasks"]) == 9
    refused = {name for name, row in found["tasks"].items() if "are free after" in row.get("refused", "")}
    assert refused == {"erk, 0.1", "erk, 0.3"}  # of the head more than a third
    rows = [row for name, row in found["tasks"].items() if name not in refused]
    assert all(0 <= row["worst"] <= row["accuracy"]["mean"] + 1e-6 for row in rows)
    plain, decayed = found["few"]["decay 0"], found["few"]["decay 10"]
    assert plain["loss"]["mean"] != decayed["loss"]["mean"] and plain["soup"]["loss"] > 0

    path.write_text(json.dumps(found | {"few": {}}))
    run(digits, "--experiment", "few", "--out", str(path))
    assert json.loads(path.read_text())["few"] == found["few"]  # the same seeds; the other rows were not run again
