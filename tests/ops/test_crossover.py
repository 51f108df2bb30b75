"""What is measured, and what is kept of it."""

import json
import logging
import time

import pytest
import torch

from sparse_peft.ops import crossover as module
from sparse_peft.ops.crossover import BENCHES, Bench, crossover, meeting_point

CPU = torch.device("cpu")
SMALL = Bench(0.1, (16, 64), 32, (0.05, 0.2))
SHAPE = (60, 70)


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSE_PEFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SPARSE_PEFT_CALIBRATE", "1")
    monkeypatch.setattr(module, "_known", {})
    monkeypatch.setattr(module, "BENCHES", {"cpu": SMALL})
    return tmp_path / "cache" / "calibration.json"


def test_the_meeting_point_lies_between_the_densities_on_a_logarithmic_scale():
    assert meeting_point({0.01: 0.5, 0.04: 1.5}) == pytest.approx(0.02)
    assert meeting_point({0.01: 1.2, 0.1: 3.0}) == 0.0
    assert meeting_point({0.01: 0.2, 0.1: 0.9}) == 0.1


def test_the_crossover_is_measured_once_and_kept(cache, monkeypatch):
    first = crossover(CPU, torch.float32, SHAPE, 0.1)
    assert first.source == "measured" and first.path == "sampled" and 0 <= first.density <= 0.2
    assert set(first.ratios) <= {"0.05", "0.2"} and all(ratio > 0 for ratio in first.ratios.values())
    (key, kept) = next(iter(json.loads(cache.read_text()).items()))
    assert "float32" in key and kept["density"] == first.density
    monkeypatch.setattr(module, "measure", lambda *_: pytest.fail("measured again"))
    assert crossover(CPU, torch.float32, SHAPE, 0.1) is first
    module._known.clear()  # a new process
    again = crossover(CPU, torch.float32, SHAPE, 0.1)
    assert again.source == "cached" and again.density == first.density


def test_where_the_answer_is_clear_nothing_is_measured(cache, monkeypatch):
    monkeypatch.setattr(module, "measure", lambda *_: pytest.fail("measured"))
    assert crossover(CPU, torch.float32, SHAPE, 0.01).source == "default"
    assert crossover(CPU, torch.float32, SHAPE, 0.9).source == "default"
    monkeypatch.setenv("SPARSE_PEFT_CALIBRATE", "0")
    assert crossover(CPU, torch.float32, SHAPE, 0.1).source == "default"


def test_each_kind_of_shape_has_a_crossover_of_its_own(cache, monkeypatch):
    """The largest weight's dense product is made slow, and the small one's is not."""
    seconds = module._seconds

    def timed(action, device):
        took = seconds(action, device)
        support = action.__closure__[[*action.__code__.co_freevars].index("support")].cell_contents
        path = action.__closure__[[*action.__code__.co_freevars].index("path")].cell_contents
        is_slow = path == ("panels" if support.shape == (64, 64) else "sampled")
        return took + is_slow

    monkeypatch.setattr(module, "_seconds", timed)
    assert crossover(CPU, torch.float32, (64, 64), 0.1).density == 0.2
    assert crossover(CPU, torch.float32, (16, 16), 0.01).density == 0.0
    assert crossover(CPU, torch.float32, (50, 500), 0.1) is crossover(CPU, torch.float32, (64, 64), 0.1)
    assert len(json.loads(cache.read_text())) == 2
    assert module.known_crossover(CPU, torch.float32).density == 0.2


def test_a_shape_is_measured_in_less_than_half_a_second(cache, monkeypatch):
    monkeypatch.setattr(module, "BENCHES", BENCHES)
    start = time.process_time()
    assert crossover(CPU, torch.float32, (4096, 4096), 0.05).source == "measured"
    assert time.process_time() - start < 0.5 * torch.get_num_threads()


@pytest.mark.parametrize("content", ["no json", "[]", '{"KEY": {"path": 1}}'])
def test_a_damaged_cache_is_measured_anew(cache, content):
    cache.parent.mkdir()
    cache.write_text(content.replace("KEY", module._key(CPU, torch.float32, (64, 64))))
    assert crossover(CPU, torch.float32, SHAPE, 0.1).source == "measured"
    assert json.loads(cache.read_text())


def test_a_cache_that_cannot_be_written_is_said_and_done_without(cache, monkeypatch, caplog):
    cache.parent.write_text("a file where the folder should be")
    with caplog.at_level(logging.INFO, logger="sparse_peft"):
        assert crossover(CPU, torch.float32, SHAPE, 0.1).source == "measured"
    assert "cannot be written" in caplog.text


def test_a_kernel_that_is_wrong_is_not_used(cache, monkeypatch, caplog):
    right = module.grad_by_path
    wrong = lambda path, *args: right(path, *args) * (1.01 if path == "sampled" else 1)  # noqa: E731
    monkeypatch.setattr(module, "grad_by_path", wrong)
    found = crossover(CPU, torch.float32, SHAPE, 0.1)
    assert found.path == "panels" and "is wrong on cpu" in caplog.text
