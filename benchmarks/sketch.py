"""``python -m benchmarks.sketch``: what a real model loses when its weights are written in few bits.

Each way of writing SmolLM2-135M's linear layers takes the place of the weights, and the loss on held-out text is
measured. Bits are counted with all that is stored: scales, and tables in bfloat16.

The model's file is itself quantised: in blocks of 32 weights with a scale and a minimum each. Its "dense" weights lie
on those grids, which favours ways with small blocks.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from examples.smollm2 import held_out_loss
from sparse_peft import SketchConfig, sketch_model
from sparse_peft.calibrate import Sketch, assign_codes, fit_codebooks
from sparse_peft.ops import code_gather, pack_codes

from .held_out import HeldOut, check_ways
from .workloads import LLAMA_TARGETS

RESULTS = Path(__file__).parent / "results" / "sketch-perplexity-smollm2-cpu.json"
TABLE_BITS = 16
BLOCK = 64


@dataclass(frozen=True)
class Way:
    """One way of writing weights in few bits.

    Attributes:
        clustering: how tables are made.
        groups: parts of a row with a table each.
        block: instead, weights of a part.
        stored: bits that a part stores besides codes; None for those of its table's entries.
        data: steps of ``sparse_peft.sketch_model``; None for the nearest entries.
    """

    clustering: str
    groups: int = 1
    block: int | None = None
    stored: float | None = None
    data: dict[str, bool] | None = None


# A scale and a minimum of 16 bits each; QLoRA's scales are 8 bits, and those of 256 blocks share one of 32.
UNIFORM_BITS, NF4_BITS = 32, 8 + 32 / 256
WAYS = {
    "round to nearest": Way("uniform", stored=UNIFORM_BITS),
    "round to nearest, blocks of 64": Way("uniform", block=BLOCK, stored=UNIFORM_BITS),
    "NF4, blocks of 64": Way("nf4", block=BLOCK, stored=NF4_BITS),
    "k-means, Lloyd": Way("lloyd"),
    "k-means": Way("dp"),
    "k-means, 2 groups": Way("dp", groups=2),
    "round to nearest, compensated": Way("uniform", stored=UNIFORM_BITS, data={"compensate": True, "refit": False}),
    "k-means, weighted": Way("dp", data={"compensate": False, "refit": False}),
    "k-means, weighted, refit": Way("dp", data={"compensate": False, "refit": True}),
    "k-means, compensated": Way("dp", data={"compensate": True, "refit": False}),
    "k-means, compensated, refit": Way("dp", data={"compensate": True, "refit": True}),
    "k-means, 2 groups, compensated, refit": Way("dp", groups=2, data={"compensate": True, "refit": True}),
}


@dataclass(frozen=True)
class Quality:
    """What a way of writing costs: ``bits_per_weight`` of the linear layers, all that is stored counted."""

    way: str
    bits: int
    bits_per_weight: float
    loss: float
    perplexity: float
    cpu_seconds: float


def targets_of(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in model.named_modules() if name.rpartition(".")[2] in LLAMA_TARGETS}


def sketches_of(model: nn.Module, way: Way, bits: int, data: list[dict[str, Tensor]]) -> dict[str, Sketch]:
    """The layers' codes and tables; tables of k-means in bfloat16."""
    dtype = "float32" if way.stored is not None else "bfloat16"
    if way.data is not None:
        config = SketchConfig(mode="replace", bits=bits, groups=way.groups, clustering=way.clustering,
                              initial_dtype=dtype, target_modules=LLAMA_TARGETS)  # fmt: skip
        return sketch_model(model, config, data, **way.data).sketches
    found = {}
    for name, module in targets_of(model).items():
        weight = module.weight.detach()
        groups = way.groups if way.block is None else max(1, weight.shape[1] // way.block)
        tables = fit_codebooks(weight, bits, groups, method=way.clustering, name=name)
        tables = tables.to(getattr(torch, dtype)).float()
        codes = pack_codes(assign_codes(weight, tables), bits)
        found[name] = Sketch(tables, codes, bits, groups, weight.shape[1])
    return found


def bits_per_weight(sketches: dict[str, Sketch], way: Way) -> float:
    """Of all layers together; padding of packed rows to whole bytes counts."""
    codes = sum(8 * sketch.codes.numel() for sketch in sketches.values())
    parts = sum(sketch.codebooks.shape[0] * sketch.groups for sketch in sketches.values())
    entries = sum(sketch.codebooks.numel() for sketch in sketches.values())
    weights = sum(sketch.codes.shape[0] * sketch.cols for sketch in sketches.values())
    return (codes + (entries * TABLE_BITS if way.stored is None else parts * way.stored)) / weights


@torch.no_grad()
def quality(model: nn.Module, name: str, bits: int, data: list[dict[str, Tensor]], unseen: list[list[int]]) -> Quality:
    """The held-out loss with a way's weights in the place of the model's, which come back."""
    way, targets = WAYS[name], targets_of(model)
    began = time.process_time()
    sketches = sketches_of(model, way, bits, data)
    seconds = time.process_time() - began
    kept = {layer: module.weight.data for layer, module in targets.items()}
    try:
        for layer, sketch in sketches.items():
            decoded = code_gather(sketch.codebooks, sketch.codes, bits, sketch.cols, kept[layer].dtype)
            targets[layer].weight.data = decoded
        loss = held_out_loss(model, unseen)
    finally:
        for layer, weight in kept.items():
            targets[layer].weight.data = weight
    return Quality(name, bits, bits_per_weight(sketches, way), loss, math.exp(loss), seconds)


def show(console: Console, dense: float, rows: list[Quality]) -> None:
    table = Table(title=f"perplexity on held-out text; of the weights as they are {math.exp(dense):.2f}")
    for name in ("way", "code bits", "bits / weight", "loss", "perplexity", "CPU s"):
        table.add_column(name, justify="left" if name == "way" else "right", no_wrap=name != "way")
    for row in rows:
        table.add_row(
            row.way,
            str(row.bits),
            f"{row.bits_per_weight:.3f}",
            f"{row.loss:.4f}",
            f"{row.perplexity:.2f}",
            f"{row.cpu_seconds:.0f}",
        )
    console.print(table)


def main(
    bits: Annotated[list[int] | None, typer.Option(help="Of a code; by default 4, 3 and 2.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Ways to measure.")] = None,
    calibration: Annotated[int, typer.Option(min=1, help="Blocks of training text that sketches see.")] = 64,
    held_out: Annotated[int, typer.Option(min=1, help="Blocks of held-out text.")] = 64,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a block.")] = 128,
    out: Annotated[Path, typer.Option(help="Where the figures go, after each of them.")] = RESULTS,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what the file has.")] = False,
) -> None:
    """The loss of SmolLM2-135M on held-out text with its linear layers written in few bits."""
    ways, console = check_ways(only, WAYS), Console()
    test = HeldOut.load(calibration, held_out, length)
    cells = [(way, width) for width in bits or [4, 3, 2] for way in ways]
    rows = test.measure(cells, quality, Quality, out, console, fresh, table_bits=TABLE_BITS)
    show(console, test.dense_loss, rows)


if __name__ == "__main__":
    typer.run(main)
