"""`python -m benchmarks.peft_comparison PEFT_FOLDER EXPERIMENT`: one row of PEFT's comparison."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from .driver import run_experiment
from .offline import cpu_as_accelerator, made_up_arithmetic, use_cpu


def main(
    peft_folder: Annotated[Path, typer.Argument(help="A task's folder in PEFT's method_comparison.")],
    experiment: Annotated[Path, typer.Argument(help="A folder .../experiments/<method>/<name>.")],
    results: Annotated[Path | None, typer.Option(help="Folder of the results; PEFT's temporary_results.")] = None,
    verbose: Annotated[bool, typer.Option(help="Show what PEFT's script says.")] = True,
    keep: Annotated[bool, typer.Option(help="Keep the trained adapter in a temporary folder.")] = False,
    cpu: Annotated[bool, typer.Option(help="Run without a GPU, to try the scripts.")] = False,
    made_up: Annotated[
        int | None, typer.Option(min=8, help="Train on so many made-up sums, without a network.")
    ] = None,
) -> None:
    """Run one experiment with PEFT's own script."""
    options = (*(["-v"] if verbose else []), *([] if keep else ["--clean"]))

    def prepare(utils: ModuleType, data: ModuleType) -> None:
        if cpu:
            use_cpu(utils)
        if made_up is not None:
            made_up_arithmetic(data, made_up)

    with cpu_as_accelerator() if cpu else nullcontext():
        run_experiment(peft_folder, experiment, results=results, options=options, prepare=prepare)


if __name__ == "__main__":
    typer.run(main)
