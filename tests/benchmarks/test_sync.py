"""The benchmark of weight sync counts bytes as they are, and its engine has the merged model's bits."""

import json

import typer
from typer.testing import CliRunner

from benchmarks import sync


def test_a_whole_run_on_a_tiny_model(tmp_path):
    app = typer.Typer()
    app.command()(sync.main)
    path = tmp_path / "sync.json"
    result = CliRunner().invoke(app, ["--small", "--rounds", "1", "--shares", "0.05", "--output", str(path)])
    assert result.exit_code == 0, result.output
    (case,) = json.loads(path.read_text())["cases"]
    assert case["equal"]
    assert case["later"] < case["first"] < case["full"]
