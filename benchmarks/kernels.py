"""``python -m benchmarks.kernels``: each op against what it replaces, on one layer, and the measured crossover.

Ratios are paired within rounds. The values' gradient and the search for candidates refer to the dense weight gradient
``G.T @ X``; writing entries, the decode product and codebooks to the layer's forward product; top-k to ``torch.topk``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sparse_peft.numerics import accumulation_dtype, topk_indices
from sparse_peft.ops import (
    cache_file,
    code_gather,
    code_scatter_add,
    delta_matmul_add_,
    kernel_backend,
    masked_dw,
    pack_codes,
    resync_,
    scatter_add_,
    support_grad,
    use_backend,
)
from sparse_peft.ops.crossover import measure
from sparse_peft.support import Support, random_blocks

from .measure import Ratio, interleave, main_clock, paired
from .report import environment, write_json

RESULTS = Path(__file__).parent / "results"
DENSITIES = (0.001, 0.005, 0.01, 0.05, 0.1, 0.2)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BLOCK_SIZES = (16, 32, 64)
CANDIDATE_SHARE = 0.01
DECODE_TOKENS = 4
BITS = 4


@dataclass(frozen=True)
class Measurement:
    """One op on one layer.

    Attributes:
        op: what was run, and by which path.
        reference: what the ratio refers to.
        density: share of the weight; None where the op has none.
        seconds: median.
        ratio: to the reference, paired within rounds.
        gigabytes_per_second: of what writing entries must move at least: position, value, original, and a sector of
            32 bytes for each entry, which the hardware writes at a time. None for other ops.
    """

    op: str
    reference: str
    density: float | None
    seconds: float
    ratio: Ratio
    gigabytes_per_second: float | None = None


@dataclass(frozen=True)
class Goal:
    """A bound on the median ratio of some ops, on the CPU."""

    op: str
    bound: float
    density: float | None = None


GOALS = (
    Goal("gradient: sampled", 0.30, 0.01),
    Goal("gradient: blocks of 32, tiles", 0.80, 0.2),
    Goal("write entries: resync_", 0.03, 0.01),
    Goal("top-k: sampled threshold", 0.5, CANDIDATE_SHARE),
)


class Layer:
    """One square layer with its activations: everything the ops are called with."""

    def __init__(self, d: int, tokens: int, device: torch.device, dtype: torch.dtype):
        torch.manual_seed(0)
        self.d, self.device, self.dtype = d, device, dtype
        self.weight = torch.randn(d, d, device=device).to(dtype)
        self.x = torch.randn(tokens, d, device=device).to(dtype)
        self.grad = torch.randn(tokens, d, device=device).to(dtype)

    def support(self, density: float) -> Support:
        count = round(density * self.d * self.d)
        return Support.random((self.d, self.d), count, seed=0, name="layer").to(self.device)

    def blocks(self, density: float, size: int) -> Support:
        count = max(1, round(density * (self.d // size) ** 2))
        return random_blocks((self.d, self.d), (size, size), count, seed=0, name="layer").to(self.device)


def _forced(backend: str, action: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with use_backend(backend):
            return action()

    return run


def _gradients(layer: Layer, density: float) -> Iterator[tuple[str, Callable[[], object]]]:
    support = layer.support(density)
    paths = ["panels", "sampled"] if layer.device.type == "cpu" else ["panels", "triton", "cuda"]
    for path in paths:
        yield f"gradient: {path}", _forced(path, lambda: support_grad(layer.grad, layer.x, support))
    for size in BLOCK_SIZES:
        blocks = layer.blocks(density, size)
        run = _forced("tiles", lambda blocks=blocks: support_grad(layer.grad, layer.x, blocks))
        yield f"gradient: blocks of {size}, tiles", run


def _writes(layer: Layer, density: float) -> Iterator[tuple[str, Callable[[], object]]]:
    support = layer.support(density)
    originals = layer.weight.view(-1)[support.indices.long()]
    values = torch.zeros(support.nnz, device=layer.device)
    backends = [None]
    if layer.device.type == "cuda":
        backends = ["triton", "cuda"]
    for backend in backends:
        name = "" if backend is None else f", {backend}"
        for op, run in (
            ("resync_", lambda: resync_([layer.weight], [support.indices], [originals], [values])),
            ("scatter_add_", lambda: scatter_add_(layer.weight, support.indices, values)),
        ):
            yield f"write entries: {op}{name}", run if backend is None else _forced(backend, run)


def _decode(layer: Layer, density: float) -> Iterator[tuple[str, Callable[[], object]]]:
    support, x = layer.support(density), layer.x[:DECODE_TOKENS]
    values, out = torch.randn(support.nnz, device=layer.device), layer.x.new_zeros(DECODE_TOKENS, layer.d)
    yield "decode: delta_matmul_add_", lambda: delta_matmul_add_(out, x, values, support.row_ptr, support.cols)


def _codes(layer: Layer) -> Iterator[tuple[str, Callable[[], object]]]:
    codes = pack_codes(torch.randint(0, 1 << BITS, (layer.d, layer.d), device=layer.device), BITS)
    codebook = torch.randn(layer.d, 4, 1 << BITS, device=layer.device)
    yield "codebook: code_gather", lambda: code_gather(codebook, codes, BITS, layer.d, layer.dtype)
    yield "codebook: code_scatter_add", lambda: code_scatter_add(layer.weight, codes, BITS, 4)


def _candidates(layer: Layer) -> Iterator[tuple[str, Callable[[], object]]]:
    support = layer.support(CANDIDATE_SHARE)
    yield "candidates: masked_dw", lambda: masked_dw(layer.grad, layer.x, support, support.nnz)


def _topk(layer: Layer) -> tuple[Callable[[], object], Callable[[], object]]:
    scores = layer.weight.float().abs().reshape(-1)
    k = round(CANDIDATE_SHARE * scores.numel())
    return lambda: torch.topk(scores, k, sorted=False), lambda: topk_indices(scores, k)


def _compare(
    reference: str,
    base: Callable[[], object],
    ops: dict[tuple[str, float | None], Callable[[], object]],
    rounds: int,
    device: torch.device,
) -> list[Measurement]:
    names = {f"{op} @ {density}": (op, density) for op, density in ops}
    actions = {name: ops[key] for name, key in names.items()}
    samples = interleave({reference: base, **actions}, rounds, device)
    clock = main_clock(device)
    found = []
    for name, (op, density) in names.items():
        times = sorted(sample.on(clock) for sample in samples[name])
        ratio = paired(samples[name], samples[reference], clock)
        found.append(Measurement(op, reference, density, times[len(times) // 2], ratio))
    return found


def _throughput(measured: Measurement, layer: Layer) -> Measurement:
    if not measured.op.startswith("write entries"):
        return measured
    entries = measured.density * layer.d**2
    moved = entries * (4 + 4 + layer.dtype.itemsize + 32)
    return Measurement(**{**vars(measured), "gigabytes_per_second": moved / measured.seconds / 1e9})


@torch.no_grad()
def measure_layer(
    d: int, tokens: int, device: torch.device, dtype: torch.dtype, rounds: int, densities: tuple[float, ...]
) -> list[Measurement]:
    """All ops on one layer ``(d, d)`` with ``tokens`` tokens."""
    layer = Layer(d, tokens, device, dtype)

    def dense() -> Tensor:
        if dtype != accumulation_dtype(dtype) and device.type == "cuda":
            return torch.mm(layer.grad.t(), layer.x, out_dtype=torch.float32)
        return layer.grad.t() @ layer.x

    gradients = {(op, density): run for density in densities for op, run in _gradients(layer, density)}
    gradients |= {(op, CANDIDATE_SHARE): run for op, run in _candidates(layer)}
    found = _compare("dense weight gradient", dense, gradients, rounds, device)
    forwards = {
        (op, density): run for density in densities for part in (_writes, _decode) for op, run in part(layer, density)
    }
    forwards |= {(op, None): run for op, run in _codes(layer)}
    found += _compare("forward product", lambda: layer.x @ layer.weight.t(), forwards, rounds, device)
    slow, fast = _topk(layer)
    found += _compare("torch.topk", slow, {("top-k: sampled threshold", CANDIDATE_SHARE): fast}, rounds, device)
    return [_throughput(measured, layer) for measured in found]


def _show(title: str, found: list[Measurement], console: Console) -> None:
    table = Table(title=title)
    for column in ("op", "density", "ms", "ratio (lowest-highest)", "to", "GB/s"):
        table.add_column(column, justify="left" if column in ("op", "to") else "right", no_wrap=True)
    for m in found:
        density = "-" if m.density is None else f"{100 * m.density:g} %"
        ratio = f"{m.ratio.median:.3f} ({m.ratio.low:.3f}-{m.ratio.high:.3f})"
        speed = "-" if m.gigabytes_per_second is None else f"{m.gigabytes_per_second:.1f}"
        table.add_row(m.op, density, f"{1e3 * m.seconds:.2f}", ratio, m.reference, speed)
    console.print(table)


def judge(found: list[Measurement]) -> list[dict]:
    """Every goal on every measurement it is for."""
    return [
        {**vars(goal), "ratio": m.ratio.median, "passed": m.ratio.median <= goal.bound}
        for goal in GOALS
        for m in found
        if m.op == goal.op and m.density == goal.density
    ]


def main(
    d: Annotated[list[int] | None, typer.Option(help="Layer sizes; default 1024, 2048 and 4096.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="Tokens; default 512 and 2048.")] = None,
    densities: Annotated[list[float] | None, typer.Option(help="Default 0.1 to 20 %.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Samples of each op.")] = 7,
    threads: Annotated[int, typer.Option(min=1, help="PyTorch's threads.")] = 2,
    device: Annotated[str | None, typer.Option(help="Default cuda where there is one, else cpu.")] = None,
    dtype: Annotated[str, typer.Option(help="Of weights and activations: float32, bfloat16 or float16.")] = "float32",
    output: Annotated[Path | None, typer.Option(help="JSON file; default results/kernels-<device>.json.")] = None,
    check: Annotated[bool, typer.Option(help="Exit with 1 if a goal is missed (CPU).")] = False,
) -> None:
    """Time each op against what it replaces, and measure the crossover between sparse and dense gradients."""
    if dtype not in DTYPES:
        raise typer.BadParameter(f"--dtype {dtype}: choose one of {', '.join(DTYPES)}")
    torch.set_num_threads(threads)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    console = Console(width=140)
    layers, missed = [], 0
    for size in d or [1024, 2048, 4096]:
        for count in tokens or [512, 2048]:
            found = measure_layer(size, count, where, DTYPES[dtype], rounds, tuple(densities or DENSITIES))
            _show(f"{size} x {size}, {count} tokens, {dtype}", found, console)
            goals = judge(found) if where.type == "cpu" else []
            for goal in goals:
                if not goal["passed"]:
                    missed += 1
                    console.print(f"[red]missed[/red]: {goal['op']}: {goal['ratio']:.3f}, bound {goal['bound']}")
            measurements = [asdict(m) for m in found]
            layers.append({"d": size, "tokens": count, "measurements": measurements, "goals": goals})
    calibration = asdict(measure(where, DTYPES[dtype]))
    console.print(f"crossover: {calibration['path']} up to {100 * calibration['density']:.2g} % of the weight")
    console.print(f"(training measures it for itself when it matters, and keeps it in {cache_file().name})")
    kernel = kernel_backend("write_many", DTYPES[dtype], where)
    content = {
        **environment(where),
        "dtype": dtype,
        "rounds": rounds,
        "writes_by": kernel or "torch",
        "layers": layers,
    }
    path = output or RESULTS / f"kernels-{where.type}.json"
    write_json(path, {**content, "calibration": calibration})
    console.print(f"written: {path}")
    if check and missed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
