"""``python -m benchmarks.plot``: a step's time and memory over density, from a result of ``benchmarks.step``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

RESULTS = Path(__file__).parent / "results"
IMAGE = Path(__file__).parents[1] / "docs" / "images" / "step-over-density.png"
PANELS = {
    "step_vs_lora": "training step ÷ LoRA r=16's",
    "peak_vs_frozen": "peak memory of a step ÷ frozen model's",
}
KINDS = {"sparse-": ("single entries", "o", "-"), "blocks-": ("blocks of 32", "s", "--")}


def _value(row: dict, field: str) -> float:
    value = row[field]
    return value["median"] if isinstance(value, dict) else value


def draw(content: dict, path: Path) -> None:
    """Two panels over density: a line for each layer size and kind of support, and where other methods lie.

    Args:
        content: what ``benchmarks.step`` wrote.
        path: the PNG file.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415  (an optional package)

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    panels = figure.subplots(1, len(PANELS))
    for axis, (field, title) in zip(panels, PANELS.items(), strict=True):
        for number, workload in enumerate(content["workloads"]):
            for prefix, (kind, marker, line) in KINDS.items():
                rows = [r for r in workload["rows"] if r["method"].startswith(prefix) and r["density"] is not None]
                if rows:
                    axis.plot(
                        [100 * r["density"] for r in rows],
                        [_value(r, field) for r in rows],
                        marker=marker,
                        linestyle=line,
                        color=f"C{number}",
                        label=f"{kind}, {workload['workload'].removeprefix('synthetic-')}",
                    )
        others = {}
        for workload in content["workloads"]:
            for row in workload["rows"]:
                if row["density"] is None and not row["is_sparse"] and row["method"] != "frozen":
                    others.setdefault(row["method"], []).append(_value(row, field))
        for number, (method, values) in enumerate(sorted(others.items())):
            middle = sorted(values)[len(values) // 2]
            axis.axhline(middle, color="0.4", linewidth=0.8, linestyle=":")
            # names of lines that lie close together would cover one another in one column
            axis.annotate(method, (0.01 + 0.22 * (number % 4), middle), xycoords=("axes fraction", "data"), fontsize=8)
        axis.set_xscale("log")
        axis.set_xlabel("density, %")
        axis.set_title(title)
        axis.set_ylim(bottom=0)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(
    result: Annotated[Path, typer.Argument(help="JSON file of benchmarks.step.")] = RESULTS / "step-grid-cpu.json",
    output: Annotated[Path, typer.Option(help="PNG file.")] = IMAGE,
) -> None:
    """Draw a step's time and memory over density."""
    draw(json.loads(result.read_text(encoding="utf-8")), output)
    print(f"written: {output}")


if __name__ == "__main__":
    typer.run(main)
