"""Quality gained against forgetting, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .methods import DEFAULT, FULL, LORA, RANDOM
from .table import Comparison, Row

OTHERS = {LORA: "C3", FULL: "black", RANDOM: "0.5", DEFAULT: "C2"}
THEIRS = ("lora-mlp", "rslora", "dora", "shira", "super-tuning")


def draw(tables: dict[Comparison, list[Row]], path: Path) -> None:
    """A panel for each comparison: gain upwards, loss risen elsewhere to the right.

    Bars are deviations over seeds. Thin lines lead through the rates that LoRA, random positions and full fine-tuning
    tried with one seed, but for far worse ones.

    Args:
        tables: those with figures of forgetting are drawn.
        path: the PNG file.

    Raises:
        ValueError: none has.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415  (an optional package)

    shown = {key: rows for key, rows in tables.items() if any(row.forgotten for row in rows)}
    if not shown:
        raise ValueError("no run has losses on other domains: nothing can be drawn; run a task of SmolLM2 first")
    figure = Figure(figsize=(7 * len(shown), 5), layout="constrained")
    for axis, (key, rows) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True):
        _panel(axis, key, [row for row in rows if row.forgotten])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _panel(axis: Any, key: Comparison, rows: Sequence[Row]) -> None:
    for row in rows:
        assert row.forgotten is not None
        colour, marker = _look(row.method)
        if row.method in OTHERS:
            # far worse rates would shrink all that matters
            path = [(trial.forgotten, trial.gained) for trial in row.tried if trial.gained > row.gained.mean / 2]
            axis.plot(*zip(*path, strict=True), color=colour, alpha=0.35, linewidth=0.8, marker=".", markersize=4)
        axis.errorbar(
            row.forgotten.mean, row.gained.mean, xerr=row.forgotten.spread, yerr=row.gained.spread,
            fmt=marker, color=colour, capsize=2, elinewidth=0.6, alpha=0.85,
        )  # fmt: skip
    axis.axvline(0, color="0.8", linewidth=0.8, zorder=0)
    unit = "fall of the held-out loss" if key.judged_by == "loss" else "rise of the accuracy"
    axis.set(title=key.title, xlabel="forgotten: rise of the loss on other domains", ylabel=f"gained: {unit}")
    axis.figure.canvas.draw()  # fixes the limits, by which labels are placed
    _label(axis, rows)


def _label(axis: Any, rows: Sequence[Row]) -> None:
    """Names beside the points, lower where one would cover another."""
    taken: list[tuple[float, float, float]] = []  # left, right, height of labels, in points
    for row in sorted(rows, key=lambda row: -row.gained.mean):
        assert row.forgotten is not None
        at = (row.forgotten.mean, row.gained.mean)
        x, y = axis.transData.transform(at) * 72 / axis.figure.dpi
        left, right, below = x + 5, x + 5 + 4.6 * len(row.method), 3
        while any(left < end and start < right and abs(y + below - other) < 8 for start, end, other in taken):
            below -= 1
        taken.append((left, right, y + below))
        axis.annotate(
            row.method, at, xytext=(5, below), textcoords="offset points", fontsize=8, color=_look(row.method)[0],
        )  # fmt: skip


def _look(method: str) -> tuple[str, str]:
    if method in OTHERS:
        return OTHERS[method], "s"
    return ("C1", "s") if method in THEIRS else ("C0", "o")
