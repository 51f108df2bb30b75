"""The load test, whole, on a tiny model: every answer is right, and none is lost."""

import json

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import load
from benchmarks.load import LORA, MERGED, S2FT, SPARSE, SYSTEMS


def test_many_clients_are_served_by_all_systems(tmp_path):
    pytest.importorskip("starlette", reason="the server's packages are in the extra 'serve'")
    pytest.importorskip("uvicorn", reason="the server's packages are in the extra 'serve'")
    app = typer.Typer()
    app.command()(load.main)
    path = tmp_path / "load.json"
    sizes = "--model llama --d 64 --depth 1 --adapters 3 --clients 3 --requests 2 --rounds 2 --tokens 4 --rank 2"
    command = f"{sizes} --merged-models 2 --output {path}"
    outcome = CliRunner().invoke(app, command.split(), catch_exceptions=False)
    assert outcome.exit_code == 0 and "Clients of one server" in outcome.output
    systems = {found["name"]: found for found in json.loads(path.read_text())["systems"]}
    assert set(systems) == set(SYSTEMS)
    for found in systems.values():
        assert (found["requests"], found["wrong"], found["lost"]) == (12, 0, 0)
        assert 0 < found["p50"] <= found["p95"] and found["tokens_per_second"] > 0 and 1 <= found["rows"] <= 3
    assert set(systems[SPARSE]["versus"]) == {S2FT, LORA, MERGED}


def test_a_wrong_answer_is_found(tmp_path, monkeypatch):
    pytest.importorskip("starlette", reason="the server's packages are in the extra 'serve'")
    monkeypatch.setattr(load, "send", lambda *_: ("something else", 1, 0.1))
    app = typer.Typer()
    app.command()(load.main)
    command = "--model llama --d 64 --depth 1 --adapters 1 --clients 1 --requests 1 --rounds 1 --tokens 2 --rank 2"
    options = ["--system", SPARSE, "--output", str(tmp_path / "x")]
    outcome = CliRunner().invoke(app, [*command.split(), *options], catch_exceptions=False)
    assert outcome.exit_code == 1 and json.loads((tmp_path / "x").read_text())["systems"][0]["wrong"] == 1
