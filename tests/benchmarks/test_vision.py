"""The vision benchmark runs every method, at equal numbers of parameters, and says what it found."""

import json
import math

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks import vision


def images(each=24):
    """Stand-ins for the digits: a bright bar for each, and noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(10).repeat(each)
    pixels = torch.randn(len(labels), 1, 28, 28, generator=generator) * 0.2 - 0.5
    for index, label in enumerate(labels.tolist()):
        pixels[index, :, 2 * label + 3 : 2 * label + 6] += 1
    return vision.Images(pixels.clamp(-1, 1), labels)


@pytest.fixture
def command(monkeypatch):
    monkeypatch.setattr(vision, "digits", images)
    app = typer.Typer()
    app.command()(vision.main)
    return lambda line: CliRunner().invoke(app, line.split(), catch_exceptions=False)


def test_all_methods_run(command, tmp_path, monkeypatch):
    monkeypatch.setattr(vision.Bench, "best_rate", lambda self, method: 3e-3)
    path = tmp_path / "vision.json"
    outcome = command(
        f"--steps 10 --first-steps 10 --seeds 2 --each 2 --hidden 16 --layers 1 --rank 2 --batch 4 --out {path}"
    )
    assert outcome.exit_code == 0, outcome.output
    content = json.loads(path.read_text())
    assert content["environment"]["device"] == "cpu" and content["unseen_images"] == {"new": 60, "turned": 120}
    names = list(vision.methods(2, 0))
    assert [run["method"] for run in content["runs"]] == [name for _ in vision.TASKS for name in names for _ in (0, 1)]
    runs = {(run["task"], run["method"], run["seed"]): run for run in content["runs"]}
    assert all(math.isfinite(run["loss"]) and 0 <= run["accuracy"] <= 1 for run in runs.values())
    sides = 4 * (16 + 16) + 2 * (16 + 64)
    head = 5 * 17
    for name in names:
        trained = runs["new", name, 0]["trained"]
        if name == vision.HEAD:
            assert trained == head
        elif name != vision.FULL:
            assert trained - 2 * sides - head == (18 if name.startswith("snella") else 0), name
    assert runs["new", "snella, to a tenth", 1]["kept_share"] == pytest.approx(0.1, abs=0.001)
    assert runs["new", "snell, half", 0]["kept_share"] == 0.5
    assert runs["new", "snell, half", 0]["loss"] != runs["new", "snell, half", 1]["loss"]


def test_learning_helps_and_the_rate_is_searched(command, tmp_path):
    path = tmp_path / "vision.json"
    outcome = command(
        "--steps 60 --first-steps 60 --seeds 1 --each 6 --hidden 16 --layers 1 --rank 4 --batch 16 --task new "
        f"--only lora --only full --out {path}"
    )
    assert outcome.exit_code == 0, outcome.output
    runs = {run["method"]: run for run in json.loads(path.read_text())["runs"]}
    assert runs["lora"]["accuracy"] > 0.5 and runs["lora"]["learning_rate"] in vision.RATES["lora"]
    assert runs["full"]["learning_rate"] in vision.RATES["full"]


def test_images_are_set_aside(command):
    task = vision.Task.make("new", images())
    assert task.classes == 5 and len(task.pool.labels) == 40
    parts = (task.pool, task.choosing, task.unseen)
    seen = {bytes(image.numpy().tobytes()) for part in parts for image in part.pixels}
    assert len(seen) == 120
    training = task.training_images(3, 4)
    assert torch.bincount(training.labels).tolist() == [4] * 5
    assert not torch.equal(training.pixels, task.training_images(4, 4).pixels)
    turned = vision.Task.make("turned", images())
    assert turned.classes == 10 and torch.equal(turned.pool.pixels[0].rot90(-1, (1, 2)), images().pixels[0])
    assert command("--only full").exit_code != 0 and command("--task other").exit_code != 0
