"""``python -m benchmarks.sketch_layers``: what the outputs of a real model's layers lose in few bits.

Second moments of the inputs of a few layers of SmolLM2-135M are collected on training text and on held-out text. Each
way of ``benchmarks.sketch``, and steps of it, make codes and tables for some rows of each layer from the first; the
relative error of the outputs, ``tr(E H E^T) / tr(W H W^T)``, is that of the second. Seconds suffice where whole models
take minutes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import geometric_mean
from typing import Annotated

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from examples.smollm2 import kjv_blocks, load_model, load_tokenizer
from sparse_peft.calibrate import (
    ModelPass,
    assign_codes,
    compensated_sketch,
    fit_codebooks,
    output_error,
    refit_codebooks,
)
from sparse_peft.calibrate.activations import second_moments
from sparse_peft.ops import code_gather, pack_codes

from .held_out import as_batches
from .report import environment, write_json
from .sketch import BLOCK

RESULTS = Path(__file__).parent / "results" / "sketch-layers-smollm2-cpu.json"
KINDS = ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"]
Coded = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Errors:
    """Relative output errors of one way at one width: on the held-out text, and where the sketch was made."""

    way: str
    bits: int
    held_out: dict[str, float]
    calibration: dict[str, float]
    cpu_seconds: float

    @property
    def mean(self) -> float:
        return geometric_mean(self.held_out.values())


def coded(
    weight: Tensor,
    moment: Tensor,
    bits: int,
    method: str = "dp",
    groups: int = 1,
    block: int | None = None,
    importance: float = 0.0,
    sweep: dict[str, float] | None = None,
    refit: bool = False,
) -> Coded:
    """Tables and codes; ``sweep`` has options of the compensated sweep, None takes the nearest entries."""
    groups = groups if block is None else max(1, weight.shape[1] // block)
    tables = fit_codebooks(weight, bits, groups, method=method, weights=moment.diagonal().pow(importance))
    if sweep is None:
        codes = assign_codes(weight, tables)
    else:
        _, codes = compensated_sketch(weight, moment, bits, groups, codebooks=tables, **sweep)
    return refit_codebooks(weight, codes, moment, tables) if refit else tables, codes


nearest, swept = coded, partial(coded, sweep={})
WAYS: dict[str, Callable[[Tensor, Tensor, int], Coded]] = {
    "round to nearest": partial(nearest, method="uniform"),
    "round to nearest, blocks of 64": partial(nearest, method="uniform", block=BLOCK),
    "NF4, blocks of 64": partial(nearest, method="nf4", block=BLOCK),
    "k-means, Lloyd": partial(nearest, method="lloyd"),
    "k-means": nearest,
    "k-means, 2 groups": partial(nearest, groups=2),
    "k-means, weighted": partial(nearest, importance=1.0),
    "k-means, refit": partial(nearest, refit=True),
    "k-means, weighted, refit": partial(nearest, importance=1.0, refit=True),
    "round to nearest, compensated": partial(swept, method="uniform"),
    "compensated": swept,
    "compensated, columns as they come": partial(coded, sweep={"act_order": False}),
    "compensated, damping 0.01": partial(coded, sweep={"damping": 0.01}),
    "compensated, weighted": partial(swept, importance=0.5),
    "compensated, weighted, refit": partial(swept, importance=0.5, refit=True),
    "compensated, weighted, refit, 2 groups": partial(swept, importance=0.5, refit=True, groups=2),
}


def moments(model: nn.Module, targets: dict[str, nn.Module], blocks: list[list[int]]) -> dict[str, Tensor]:
    found = second_moments(targets)
    found.run(ModelPass(model, as_batches(blocks, 8)))
    return {name: found.sums[name] / found.tokens[name] for name in targets}


def measure(
    name: str, bits: int, weights: dict[str, Tensor], seen: dict[str, Tensor], unseen: dict[str, Tensor]
) -> Errors:
    began = time.process_time()
    made = {layer: WAYS[name](weight, seen[layer], bits) for layer, weight in weights.items()}
    seconds = time.process_time() - began
    errors: dict[str, list[float]] = {}
    for layer, (tables, codes) in made.items():
        weight = weights[layer]
        decoded = code_gather(tables, pack_codes(codes, bits), bits, weight.shape[1], weight.dtype)
        errors[layer] = [output_error(weight, decoded, moment[layer]) for moment in (unseen, seen)]
    return Errors(name, bits, {k: v[0] for k, v in errors.items()}, {k: v[1] for k, v in errors.items()}, seconds)


def show(console: Console, rows: list[Errors]) -> None:
    layers = list(rows[0].held_out)
    table = Table(title="relative error of the outputs on held-out text")
    for name in ("way", "bits", *(layer.rpartition(".")[2] for layer in layers), "mean"):
        table.add_column(name, justify="left" if name == "way" else "right", no_wrap=True)
    for row in rows:
        errors = (*row.held_out.values(), row.mean)
        table.add_row(row.way, str(row.bits), *(f"{error:.5f}" for error in errors))
    console.print(table)


def main(
    block: Annotated[int, typer.Option(min=0, help="Whose layers; the model is cut off behind it.")] = 8,
    rows: Annotated[int, typer.Option(min=1, help="Of each layer, chosen at random.")] = 256,
    calibration: Annotated[int, typer.Option(min=1, help="Blocks of training text.")] = 32,
    held_out: Annotated[int, typer.Option(min=1, help="Blocks of held-out text.")] = 16,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a block.")] = 128,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = RESULTS,
) -> None:
    """Output errors of one block of SmolLM2-135M, at 4, 3 and 2 bits."""
    tokenizer, model = load_tokenizer(), load_model().base_model
    model.layers = model.layers[: block + 1]
    targets = {kind: model.layers[block].get_submodule(kind) for kind in KINDS}
    seen = moments(model, targets, kjv_blocks(tokenizer, length, limit=calibration))
    unseen = moments(model, targets, kjv_blocks(tokenizer, length, "heldout", limit=held_out))
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for kind, module in targets.items():
        chosen = torch.randperm(module.out_features, generator=generator)[:rows]
        weights[kind] = module.weight.detach()[chosen]
    found = [measure(name, bits, weights, seen, unseen) for bits in (4, 3, 2) for name in WAYS]
    show(Console(), found)
    write_json(
        out,
        {
            "format": 1,
            "environment": environment(torch.device("cpu")),
            "options": {
                "block": block, "rows": rows, "calibration_blocks": calibration, "held_out_blocks": held_out,
                "length": length,
            },
            "rows": [asdict(row) | {"mean": row.mean} for row in found],
        },
    )  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
