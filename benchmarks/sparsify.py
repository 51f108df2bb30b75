"""``python -m benchmarks.sparsify``: what a real model loses when half of its weights, or more, become zero.

SmolLM2-135M's linear layers are pruned without training, and the loss on held-out text is measured. Text and model are
those of ``benchmarks.sketch``, with fewer blocks. The model comes back bit for bit after each way.

The model's file is itself quantised: a block of 32 weights has at most 16 values, so that many magnitudes tie.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from examples.smollm2 import held_out_loss
from sparse_peft.sparsify import Armor, prune, restore

from .held_out import HeldOut, check_ways

RESULTS = Path(__file__).parent / "results" / "sparsify-smollm2-cpu.json"
PATTERNS = ("0.5", "0.6", "2:4")
# {name: arguments of prune}
WAYS: dict[str, dict[str, Any]] = {
    "random": {"score": "random"},
    "magnitude": {"score": "magnitude"},
    "Wanda": {"score": "wanda"},
    "NoWag": {"score": "nowag"},
    "Wanda, DSnoT": {"score": "wanda", "refine": "dsnot"},
    "SparseGPT": {"score": "sparsegpt"},
    "NoWag, ARMOR": {"score": "nowag", "refine": Armor(sweeps=3)},  # most of the gain, for some time
}


@dataclass(frozen=True)
class Quality:
    """What a way of pruning costs: ``density`` is the share of the linear layers' weights that stay."""

    way: str
    pattern: str
    density: float
    loss: float
    perplexity: float
    cpu_seconds: float


def fits(way: str, pattern: str) -> bool:
    """ARMOR has n:m weights alone."""
    return not isinstance(WAYS[way].get("refine"), Armor) or ":" in pattern


@torch.no_grad()
def quality(
    model: nn.Module, name: str, pattern: str, data: list[dict[str, Tensor]], unseen: list[list[int]]
) -> Quality:
    """The held-out loss of the pruned model, which comes back."""
    began = time.process_time()
    masks = prune(model, pattern, calibration=data, restorable=True, progress=False, **WAYS[name])
    seconds = time.process_time() - began
    try:
        loss = held_out_loss(model, unseen)
    finally:
        restore(model)
    return Quality(name, pattern, masks.density, loss, math.exp(loss), seconds)


def show(console: Console, dense: float, rows: list[Quality]) -> None:
    table = Table(title=f"perplexity on held-out text; of the dense model {math.exp(dense):.2f}")
    patterns = list(dict.fromkeys(row.pattern for row in rows))
    for name in ("way", *patterns, "CPU s"):
        table.add_column(name, justify="left" if name == "way" else "right", no_wrap=True)
    for way in dict.fromkeys(row.way for row in rows):
        own = {row.pattern: row for row in rows if row.way == way}
        cells = [f"{own[pattern].perplexity:.2f}" if pattern in own else "-" for pattern in patterns]
        table.add_row(way, *cells, f"{max(row.cpu_seconds for row in own.values()):.0f}")
    console.print(table)


def main(
    pattern: Annotated[
        list[str] | None, typer.Option(help="Shares of zeros or n:m; by default 0.5, 0.6, 2:4.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Ways to measure.")] = None,
    calibration: Annotated[int, typer.Option(min=1, help="Blocks of training text that scores see.")] = 16,
    held_out: Annotated[int, typer.Option(min=1, help="Blocks of held-out text.")] = 16,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a block.")] = 128,
    out: Annotated[Path, typer.Option(help="Where the figures go, after each of them.")] = RESULTS,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what the file has.")] = False,
) -> None:
    """The loss of SmolLM2-135M on held-out text with its linear layers pruned."""
    ways, console = check_ways(only, WAYS), Console()
    test = HeldOut.load(calibration, held_out, length)
    cells = [(way, wanted) for wanted in pattern or PATTERNS for way in ways if fits(way, wanted)]
    show(console, test.dense_loss, test.measure(cells, quality, Quality, out, console, fresh))


if __name__ == "__main__":
    typer.run(main)
