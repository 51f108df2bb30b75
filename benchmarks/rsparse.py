"""``python -m benchmarks.rsparse``: what R-Sparse costs and saves in a layer, and with ``--quality`` in SmolLM2-135M.

Layers of random weights decode one token, and take 64 tokens at once, beside the plain layer. Several copies of each
take turns, so that weights are read from memory and not from a cache.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from examples.smollm2 import held_out_loss
from sparse_peft.sparsify import r_sparse, restore

from .held_out import CPU, HeldOut
from .measure import interleave, paired
from .report import environment, write_json

RESULTS = Path(__file__).parent / "results"
SHAPES = ((576, 1536), (2048, 2048), (2048, 8192))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# {name: share of the budget that channels get}
WAYS: dict[str, float | None] = {"channels": 1.0, "channels and low rank": None}
TOKENS = 64
COLD_BYTES = 64 * 2**20  # of the layers together: more than a cache


@dataclass(frozen=True)
class Speed:
    """Times of a layer ``outputs x inputs``, as shares of the plain layer's: medians, and errors as in ``Ratio``."""

    outputs: int
    inputs: int
    dtype: str
    sparsity: float
    share: float
    decode: float
    decode_error: float
    prompt: float
    prompt_error: float


@dataclass(frozen=True)
class Quality:
    """What a way costs: ``saved`` is the share of the multiplications of the gathered path."""

    way: str
    sparsity: str
    saved: float
    loss: float
    perplexity: float
    cpu_seconds: float


@torch.no_grad()
def speed(shape: tuple[int, int], dtype: str, sparsity: float, share: float, rounds: int) -> Speed:
    """Measure one kind of layer."""
    outputs, inputs = shape
    kind = DTYPES[dtype]
    count = max(2, COLD_BYTES // (outputs * inputs * kind.itemsize))
    fitted = nn.ModuleList([nn.Linear(inputs, outputs, bias=False, dtype=kind)])
    x = torch.randn(TOKENS, inputs, dtype=kind)
    plain = nn.ModuleList([copy.deepcopy(fitted[0]) for _ in range(count)])
    r_sparse(fitted, [x], sparsity, share=share, loss_fn=run_all, sequential=False, progress=False)
    sparse = nn.ModuleList([copy.deepcopy(fitted[0]) for _ in range(count)])
    actions = {
        f"{what} {name}": lambda layers=layers, given=given: run_all(layers, given)
        for name, layers in (("plain", plain), ("sparse", sparse))
        for what, given in (("decode", x[:1]), ("prompt", x))
    }
    samples = interleave(actions, rounds, CPU)
    decode, prompt = (paired(samples[f"{w} sparse"], samples[f"{w} plain"], "cpu") for w in ("decode", "prompt"))
    return Speed(outputs, inputs, dtype, sparsity, share, decode.median, decode.error, prompt.median, prompt.error)


def run_all(layers: nn.Module, x: Tensor) -> None:
    for layer in layers.children():
        layer(x)


@torch.no_grad()
def quality(
    model: nn.Module, way: str, sparsity: str, data: list[dict[str, Tensor]], unseen: list[list[int]]
) -> Quality:
    """The held-out loss with all tokens sparse; the model comes back."""
    began = time.process_time()
    report = r_sparse(model, data, float(sparsity), share=WAYS[way], progress=False)
    seconds = time.process_time() - began
    try:
        loss = held_out_loss(model, unseen)
    finally:
        restore(model)
    counts = report.multiplications
    return Quality(way, sparsity, 1 - counts["gathered"] / counts["dense"], loss, math.exp(loss), seconds)


def show(console: Console, rows: list[Speed]) -> None:
    table = Table(title="time of a layer, as a share of the plain one")
    for name in ("layer", "dtype", "sparsity", "share of channels", "one token", f"{TOKENS} tokens"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            f"{row.outputs}x{row.inputs}", row.dtype, f"{row.sparsity}", f"{row.share}",
            f"{row.decode:.2f} ± {row.decode_error:.2f}", f"{row.prompt:.2f} ± {row.prompt_error:.2f}",
        )  # fmt: skip
    console.print(table)


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Of all layers, interleaved.")] = 25,
    measure_quality: Annotated[bool, typer.Option("--quality", help="Perplexity of SmolLM2-135M instead.")] = False,
    sparsity: Annotated[list[float] | None, typer.Option(help="By default 0.5.")] = None,
    calibration: Annotated[int, typer.Option(min=1, help="Blocks of training text that thresholds see.")] = 16,
    held_out: Annotated[int, typer.Option(min=1, help="Blocks of held-out text.")] = 16,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a block.")] = 128,
    out: Annotated[Path | None, typer.Option(help="Where the figures go.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what the file has.")] = False,
) -> None:
    """Time and quality of R-Sparse."""
    console, wanted = Console(), sparsity or [0.5]
    if measure_quality:
        test = HeldOut.load(calibration, held_out, length)
        cells = [(way, str(share)) for share in wanted for way in WAYS]
        path = out or RESULTS / "rsparse-smollm2-cpu.json"
        for row in test.measure(cells, quality, Quality, path, console, fresh):
            console.print(
                f"{row.way}, {row.sparsity}: perplexity {row.perplexity:.2f}, dense {math.exp(test.dense_loss):.2f}"
            )
        return
    rows = [
        speed(shape, dtype, part, share, rounds)
        for shape in SHAPES for dtype in DTYPES for part in wanted for share in (1.0, 0.6)
    ]  # fmt: skip
    show(console, rows)
    content = {"format": 1, "environment": environment(CPU), "options": {"rounds": rounds, "tokens": TOKENS}}
    write_json(out or RESULTS / "rsparse-cpu.json", {**content, "rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    typer.run(main)
