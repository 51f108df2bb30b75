"""What is measured, and what is kept of it."""

import json
import logging

import pytest
import torch

from sparse_peft.ops import crossover as module
from sparse_peft.ops.crossover import Bench, crossover, meeting_point

CPU = torch.device("cpu")
SMALL = Bench(0.1, 64, 32, (0.05, 0.2))


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSE_PEFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SPARSE_PEFT_CALIBRATE", "1")
    monkeypatch.setattr(module, "_known", {})
    monkeypatch.setattr(module, "BENCHES", {"cpu": SMALL})
    return tmp_path / "cache" / "calibration.json"


def test_the_meeting_point_lies_between_the_densities_on_a_logarithmic_scale():
    assert meeting_point({0.01: 0.5, 0.04: 1.5}) == pytest.approx(0.02)
    assert meeting_point({0.01: 1.2, 0.1: 3.0}) == 0.01
    assert meeting_point({0.01: 0.2, 0.1: 0.9}) == 0.1


def test_the_crossover_is_measured_once_and_kept(cache, monkeypatch):
    first = crossover(CPU, torch.float32, 0.1)
    assert first.source == "measured" and first.path == "sampled" and 0.05 <= first.density <= 0.2
    assert set(first.ratios) == {"0.05", "0.2"} and all(ratio > 0 for ratio in first.ratios.values())
    (key, kept) = next(iter(json.loads(cache.read_text()).items()))
    assert "float32" in key and kept["density"] == first.density
    monkeypatch.setattr(module, "measure", lambda *_: pytest.fail("measured again"))
    assert crossover(CPU, torch.float32, 0.1) is first
    module._known.clear()  # a new process
    again = crossover(CPU, torch.float32, 0.1)
    assert again.source == "cached" and again.density == first.density


def test_where_the_answer_is_clear_nothing_is_measured(cache, monkeypatch):
    monkeypatch.setattr(module, "measure", lambda *_: pytest.fail("measured"))
    assert crossover(CPU, torch.float32, 0.01).source == "default"
    assert crossover(CPU, torch.float32, 0.9).source == "default"
    monkeypatch.setenv("SPARSE_PEFT_CALIBRATE", "0")
    assert crossover(CPU, torch.float32, 0.1).source == "default"


@pytest.mark.parametrize("content", ["no json", "[]", '{"KEY": {"path": 1}}'])
def test_a_damaged_cache_is_measured_anew(cache, content):
    cache.parent.mkdir()
    cache.write_text(content.replace("KEY", module._key(CPU, torch.float32)))
    assert crossover(CPU, torch.float32, 0.1).source == "measured"
    assert json.loads(cache.read_text())


def test_a_cache_that_cannot_be_written_is_said_and_done_without(cache, monkeypatch, caplog):
    cache.parent.write_text("a file where the folder should be")
    with caplog.at_level(logging.INFO, logger="sparse_peft"):
        assert crossover(CPU, torch.float32, 0.1).source == "measured"
    assert "cannot be written" in caplog.text


def test_a_kernel_that_is_wrong_is_not_used(cache, monkeypatch, caplog):
    right = module.grad_by_path
    wrong = lambda path, *args: right(path, *args) * (1.01 if path == "sampled" else 1)  # noqa: E731
    monkeypatch.setattr(module, "grad_by_path", wrong)
    found = crossover(CPU, torch.float32, 0.1)
    assert found.path == "panels" and "is wrong on cpu" in caplog.text
