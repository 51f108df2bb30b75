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

from .methods import METHODS, Budget
from .records import Run
from .sweep import Sweep
from .tasks import TASKS
from .training import Bench

RESULTS = Path(__file__).parents[1] / "results" / "quality-runs.jsonl"
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


@app.command()
def run(
    task: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(TASKS)}; all by default.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Rows to run; all by default.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each method at its best rate.")] = 3,
    rate: Annotated[list[float] | None, typer.Option(help="Take these rates, and search none.")] = None,
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
        sweep = Sweep(name, sizes, budget_of(budget), bench.run, out, known or (), lambda made: console.print(line(made)))
        methods = chosen("--method", method, METHODS)
        if not rate:
            sweep.tuned(methods, seeds)
        for fixed in rate or ():
            for seed in range(seeds):
                for row in methods:
                    sweep.run(row, fixed, seed)


if __name__ == "__main__":
    app()
