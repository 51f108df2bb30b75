"""The serving benchmark, whole, on a tiny model."""

import json

import typer
from typer.testing import CliRunner

from benchmarks import serving
from benchmarks.serving import BASE, FUSED, LORA, S2FT, SPARSE


def test_serving_is_measured_against_lora(tmp_path):
    app = typer.Typer()
    app.command()(serving.main)
    path = tmp_path / "serving.json"
    command = f"--d 64 --depth 1 --adapters 3 --tokens 4 --rank 2 --rounds 2 --threads 1 --output {path}"
    outcome = CliRunner().invoke(app, command.split(), catch_exceptions=False)
    assert outcome.exit_code == 0 and "What a server does" in outcome.output
    content = json.loads(path.read_text())
    by_what = {}
    for cost in content["costs"]:
        assert cost["seconds"] > 0 and all(ratio["median"] > 0 for ratio in cost["versus"].values())
        by_what.setdefault(cost["what"], {})[cost["method"]] = cost["versus"]
    assert {what: set(methods) for what, methods in by_what.items()} == {
        "switch": {SPARSE, S2FT, LORA, FUSED},
        "token of one adapter": {BASE, SPARSE, S2FT, LORA, FUSED},
        "mixed batch, prefill": {BASE, SPARSE, S2FT, LORA},
        "mixed batch, one token": {BASE, SPARSE, S2FT, LORA},
        "pool: again": {SPARSE, S2FT},
        "pool: loaded": {SPARSE, S2FT},
        "pool: not loaded": {SPARSE, S2FT, LORA},
    }
    assert set(by_what["switch"][SPARSE]) == {LORA, FUSED} and set(by_what["pool: not loaded"][S2FT]) == {LORA}
    sizes = {size["method"]: size for size in content["sizes"]}
    # q, k, v, o of 64 x 64 and three of 64 x 128, rank 2: as many parameters as LoRA has
    parameters = 2 * (4 * 128 + 3 * (64 + 128))
    assert sizes[LORA]["parameters"] == sizes[SPARSE]["parameters"] == parameters
    assert 0.85 * parameters <= sizes[S2FT]["parameters"] <= parameters
    assert sizes[LORA]["memory"] == 4 * parameters
    rows = 4 * 64 + 2 * 128 + 64 + 7
    assert sizes[SPARSE]["memory"] == 6 * parameters + 4 * rows  # float32 values, columns of two bytes
    channels = sizes[S2FT]["parameters"] // 64
    assert sizes[S2FT]["memory"] == 4 * (sizes[S2FT]["parameters"] + channels)
