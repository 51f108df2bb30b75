"""``sparse-peft curve``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..report import plot_sparsity_curve
from ..sparsify import SparsityCurve, as_pattern, essential_sparsity
from ..sparsify.pruning import settings
from .eval import names_in
from .folders import check_output, model_folder
from .output import ForceOption, JsonOption, answering, asked, share_text, show_table, table
from .prune import AllocationOption, CalibrationOption, ScoreOption
from .texts import DeviceOption, DtypeOption, LengthOption, batches_of, check_place, load_language_model, perplexity


def curve(
    model: Annotated[Path, typer.Argument(help="The model's folder.", metavar="MODEL")],
    text: Annotated[Path, typer.Argument(help="A text file that perplexity is measured on.", metavar="TEXT")],
    grid: Annotated[str, typer.Option(help="Shares of zeros and n:m, with commas.")] = "0.1,0.2,0.3,0.4,0.5,0.6,0.7",
    score: ScoreOption = "magnitude",
    allocation: AllocationOption = "uniform",
    calibration: CalibrationOption = None,
    tolerance: Annotated[float, typer.Option(min=0, help="Loss, as a share, that counts as free.")] = 0.01,
    baseline: Annotated[bool, typer.Option(help="Measure random pruning too.")] = True,
    length: LengthOption = 2048,
    sequences: Annotated[int, typer.Option(min=1, help="Most sequences of each text.")] = 32,
    plot: Annotated[Path | None, typer.Option(help="A PNG file to draw.")] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure a model's perplexity at growing sparsity, beside random pruning; nothing is written but the plot."""
    with answering("curve", as_json) as answer:
        model_folder(model)
        with asked():
            patterns = [as_pattern(part) for part in names_in(grid)]
            for wanted in patterns:
                settings(wanted, score, allocation, None, has_data=calibration is not None)
        check_place(dtype, device)
        if plot is not None:
            check_output(plot, force)
        batches = batches_of(text, model, length, sequences)
        data = None if calibration is None else batches_of(calibration, model, length, sequences)
        found = essential_sparsity(
            load_language_model(model, dtype, device), lambda pruned: perplexity(pruned, batches), patterns, score,
            higher_is_better=False, baseline=baseline, progress=not as_json, allocation=allocation, calibration=data,
        )  # fmt: skip
        if plot is not None:
            plot_sparsity_curve(found, plot, tolerance, "perplexity")
        answer.content = {**found.to_dict(), "tolerance": tolerance, "knee": found.knee(tolerance),
                          "plot": None if plot is None else str(plot)}  # fmt: skip
        answer.show = lambda console: show(console, found, tolerance)


def show(console: Console, found: SparsityCurve, tolerance: float) -> None:
    """A curve for people."""
    rows = [["0 %", f"{found.dense:.4g}", "", ""]]
    for point in found.points:
        random = "" if point.random is None else f"{point.random:.4g}"
        rows.append([share_text(point.sparsity), f"{point.metric:.4g}", f"{found.loss(point.metric):+.1%}", random])
    show_table(console, table(["zeros", "perplexity", "change", "random"], rows))
    console.print(
        f"[bold]knee[/], within {share_text(tolerance)} of the dense model: {share_text(found.knee(tolerance))}"
    )
    bend = found.chord_knee()
    if bend is not None:
        console.print(f"bend of the curve (farthest from its chord): {share_text(bend)}")
