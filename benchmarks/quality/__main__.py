"""The commands."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Annotated

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import typer
from rich.console import Console

from ..report import environment, write_json
from . import drift as merging
from .methods import METHODS, Budget
from .models import BASES
from .picture import draw
from .records import Run, read_runs
from .sweep import Sweep
from .table import comparisons, content, rows, standard, text
from .tasks import TASKS
from .training import Bench

FOLDER = Path(__file__).parents[1] / "results"
RESULTS = FOLDER / "quality-cpu.jsonl"
IMAGE = Path(__file__).parents[2] / "docs" / "images" / "quality.png"
app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.callback()
def main() -> None:
    """What methods gain on real tasks, and what they forget."""


def chosen(option: str, names: list[str] | None, known: dict) -> list[str]:
    """The names, or all that are known."""
    if unknown := set(names or ()) - set(known):
        raise typer.BadParameter(f"{option} {' '.join(sorted(unknown))}: of {', '.join(known)}")
    return list(names or known)


def line(run: Run) -> str:
    forgotten = "" if run.forgotten is None else f", {run.forgotten:+.4f} elsewhere"
    return (
        f"{run.task}, {run.method}, {run.budget}, rate {run.rate:g}, seed {run.seed}: {run.gained:+.4f} "
        f"{run.judged_by}{forgotten} ({run.trained:,} trained, {run.seconds:.0f} s)"
    )


def budget_of(text: str) -> Budget:
    try:
        return Budget.parse(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def rows_of(options: list[str] | None) -> tuple[list[tuple[str, float]], list[str]]:
    """Methods with a given rate, ``name@rate``, and those whose rate is searched."""
    given = [option.partition("@") for option in options or ()]
    names = chosen("--method", [name for name, _, _ in given], METHODS)
    try:
        fixed = [(name, float(rate)) for name, at, rate in given if at]
    except ValueError as error:
        raise typer.BadParameter(f"--method {' '.join(options or ())}: a rate comes after @") from error
    return fixed, [name for name, at, _ in given if not at] if given else names


@app.command()
def run(
    task: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(TASKS)}; all by default.")] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="Rows, all by default; lora@2e-4 takes this rate and searches none."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each method at its best rate.")] = 3,
    budget: Annotated[str, typer.Option(help="Trained parameters: r=16 or density=0.01.")] = "r=16",
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps; the task's own by default.")] = None,
    pool: Annotated[int | None, typer.Option(min=1, help="Rows to train on; the task's own by default.")] = None,
    device: Annotated[str, typer.Option(help="As torch names it.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="Of a CPU; two processes with one each are faster.")] = 1,
    known: Annotated[list[Path] | None, typer.Option(help="More files with runs that need not be made.")] = None,
    out: Annotated[Path, typer.Option(help="File of runs, which grows.")] = RESULTS,
) -> None:
    """Train what the file lacks: rates around each method's best, then other seeds at the best."""
    torch.set_num_threads(threads)
    console = Console()
    for name in chosen("--task", task, TASKS):
        given = {"steps": steps, "pool": pool}
        sizes = dataclasses.replace(TASKS[name].sizes, **{k: v for k, v in given.items() if v is not None})
        bench = Bench(name, sizes, torch.device(device))
        sweep = Sweep(
            name, sizes, budget_of(budget), bench.run, out, known or (), lambda made: console.print(line(made))
        )
        fixed, searched = rows_of(method)
        sweep.at(fixed, seeds)
        sweep.tuned(searched, seeds)


def runs_of(files: list[Path] | None) -> list[Run]:
    runs = read_runs(files or [RESULTS])
    if not runs:
        raise typer.BadParameter(f"no run in {', '.join(map(str, files or [RESULTS]))}: make some with `run`")
    return runs


Files = Annotated[list[Path] | None, typer.Argument(help="Files of runs.")]


@app.command()
def table(
    files: Files = None,
    out: Annotated[Path, typer.Option(help="Markdown file; the JSON file lies beside it.")] = FOLDER / "quality.md",
) -> None:
    """Mean and spread at each method's best rate, and each method's worst task."""
    runs = runs_of(files)
    write_json(out.with_suffix(".json"), content(runs))
    out.write_text(text(runs), encoding="utf-8")
    print(text(runs))


@app.command()
def picture(
    files: Files = None,
    task: Annotated[list[str] | None, typer.Option(help="Panels; all by default.")] = None,
    out: Annotated[Path, typer.Option(help="PNG file.")] = IMAGE,
) -> None:
    """Draw quality gained against forgetting."""
    tables = {key: rows(group) for key, group in comparisons(runs_of(files)).items()}
    names = chosen("--task", task, TASKS)
    draw({key: found for key, found in standard(tables).items() if key.task in names}, out)
    print(f"written: {out}")


@app.command()
def drift(
    cycles: Annotated[int, typer.Option(min=1, help="Merges, each followed by an unmerge.")] = 1000,
    blocks: Annotated[int, typer.Option(min=1, help="Of the model.")] = 1,
    rank: Annotated[int, typer.Option(min=1, help="LoRA's; the others have as many parameters.")] = 16,
    out: Annotated[Path, typer.Option(help="JSON file.")] = FOLDER / "quality-drift-cpu.json",
) -> None:
    """Merge and unmerge adapters of SmolLM2's first blocks in bfloat16, and count the weights that changed."""
    base = BASES["smollm2"]
    model = base.load().bfloat16()
    model.model.layers = model.model.layers[:blocks]
    found = [
        merging.measure(model, name, config, cycles) for name, config in merging.configs(rank, base.targets).items()
    ]
    for row in found:
        print(f"{row.method}: {row.changed:.2%} of the weights changed, by up to {row.largest:.3f} of their size")
    options = {"blocks": blocks, "rank": rank, "delta_size": merging.DELTA_SIZE}
    environment_here = environment(torch.device("cpu"))
    write_json(
        out,
        {"format": 1, "environment": environment_here, "options": options, "rows": [vars(row) for row in found]},
    )


if __name__ == "__main__":
    app()
