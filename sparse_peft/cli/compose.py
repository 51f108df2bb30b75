"""``sparse-peft compose``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ..adapters import compose as compose_adapters
from ..adapters import summarise
from ..ops import COMBINATIONS, Combination
from .folders import adapter_folder, new_folder
from .inspect import show
from .output import ForceOption, JsonOption, UsageError, answering, asked, progress, working


def compose(
    adapters: Annotated[list[Path], typer.Argument(help="Adapters' folders.", metavar="ADAPTER...")],
    out: Annotated[Path, typer.Argument(help="The new adapter's folder.", metavar="OUT")],
    weights: Annotated[str | None, typer.Option(help="A number for each, with commas; by default 1.")] = None,
    combination: Annotated[str, typer.Option(help=f"One of {', '.join(COMBINATIONS)}.")] = "linear",
    density: Annotated[float | None, typer.Option(help="Share of each adapter's entries that pruning keeps.")] = None,
    majority_sign_method: Annotated[str, typer.Option(help="With ties: total or frequency.")] = "total",
    seed: Annotated[int, typer.Option(help="With dare_linear and dare_ties.")] = 0,
    svd_rank: Annotated[int | None, typer.Option(help="With svd.")] = None,
    ignore_base_names: Annotated[
        bool, typer.Option("--ignore-base-names", help="Their base models may have different names.")
    ] = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make one adapter of several: their weighted sum, or what TIES, DARE or pruning leave of it."""
    with answering("compose", as_json) as answer:
        for folder in adapters:
            adapter_folder(folder)
        with asked():
            Combination(combination, density, majority_sign_method, seed, svd_rank)
            try:
                numbers = None if weights is None else [float(number) for number in weights.split(",")]
            except ValueError as error:
                raise UsageError(f"weights={weights}: numbers with commas are expected") from error
        if numbers is not None and len(numbers) != len(adapters):
            raise UsageError(f"weights={weights}: {len(numbers)} numbers for {len(adapters)} adapters")
        with new_folder(out, force) as staging:
            with working("combining"):
                compose_adapters(
                    adapters,
                    staging,
                    weights=numbers,
                    combination_type=combination,
                    density=density,
                    majority_sign_method=majority_sign_method,
                    seed=seed,
                    svd_rank=svd_rank,
                    ignore_base_names=ignore_base_names,
                )
            made = replace(summarise(staging, lambda layers: progress(layers, "layers")), folder=str(out))
        answer.content = {"output": str(out), **made.to_dict()}
        answer.show = lambda console: show(console, made)
