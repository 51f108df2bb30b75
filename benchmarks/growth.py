"""``python -m benchmarks.growth``: how a step, its memory and many adapters grow.

Ratios of one run: a step's process time and its memory above the frozen model's, over LoRA's r=16, by density, width,
tokens and layers; then adapters of one base in a pool, whose times are over a token of the base.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn

from sparse_peft import SparseConfig
from sparse_peft.adapters import AdapterPool

from .methods import FROZEN, Method, lora_name, methods
from .report import environment, write_json
from .runner import Row, run_workload
from .workloads import LLAMA_TARGETS, Workload, linear_stack, random_llama, smollm2

RESULTS = Path(__file__).parent / "results"
IMAGE = Path(__file__).parents[1] / "docs" / "images" / "growth.png"
RANK = 16
DENSITY = 0.01
DENSITIES = (0.0001, 0.001, 0.01, 0.05, 0.2)
WIDTHS = (512, 1024, 2048, 4096, 8192)
TOKENS = (128, 256, 512, 1024)
DEPTHS = (1, 2, 4, 8)
REPEATS = 5
CPU = torch.device("cpu")
Rows = list[dict[str, Any]]
LINES = {
    "steps": ("step_vs_lora", "above_frozen_vs_lora"),
    "adapters": ("load", "switch_and_token", "delete", "mixed_batch"),
}


class Axis(str, Enum):  # noqa: UP042
    density = "density"
    width = "width"
    tokens = "tokens"
    layers = "layers"
    adapters = "adapters"


def _workloads(axis: Axis) -> Iterator[tuple[float, Workload, float]]:
    """``(value on the axis, workload, density)``."""
    if axis is Axis.density:
        yield from ((density, random_llama(512, 2, 256, CPU, torch.float32, False), density) for density in DENSITIES)
    elif axis is Axis.width:
        yield from ((width, linear_stack(width, 1, 128, CPU, torch.float32), DENSITY) for width in WIDTHS)
    elif axis is Axis.tokens:
        yield from ((count, random_llama(512, 2, count, CPU, torch.float32, False), DENSITY) for count in TOKENS)
    else:
        yield from ((depth, random_llama(256, depth, 256, CPU, torch.float32, False), DENSITY) for depth in DEPTHS)


def _rows(density: float) -> list[Method]:
    wanted = {FROZEN, lora_name(RANK), f"sparse-{100 * density:g}%"}
    return [method for method in methods(RANK, [density]) if method.name in wanted]


def grow(axis: Axis, rounds: int, progress: Callable[[str], None]) -> Rows:
    """A step at each value of an axis: ``{"at", "step_vs_lora", "step_vs_frozen", "extra_vs_lora", "state"}``."""
    found = []
    for at, workload, density in _workloads(axis):
        result = run_workload(workload, _rows(density), lora_name(RANK), rounds, CPU, progress=progress, serving=False)
        frozen, lora, ours = result.rows
        found.append({"at": at, **_ratios(frozen, lora, ours)})
    return found


def _ratios(frozen: Row, lora: Row, ours: Row) -> dict[str, Any]:
    above = [row.state + row.peak_extra - frozen.state - frozen.peak_extra for row in (lora, ours)]
    assert ours.step_vs_lora is not None
    assert isinstance(ours.step_vs_frozen, type(ours.step_vs_lora))
    return {
        "step_vs_lora": ours.step_vs_lora.median,
        "step_vs_frozen": ours.step_vs_frozen.median,
        "entries_vs_lora": ours.entries / lora.entries,
        "above_frozen_vs_lora": above[1] / above[0],
        "state_bytes": ours.state,
        "saved_vs_frozen": ours.saved / max(1, frozen.saved),
    }


# ------------------------------------------------------------------------------------------------------------ adapters


def _seconds(act: Callable[[], object]) -> float:
    start = time.process_time()
    act()
    return time.process_time() - start


def _token(model: nn.Module, rows: int = 1) -> None:
    with torch.no_grad():
        model(torch.zeros(rows, 1, dtype=torch.long))


class _Served:
    """A pool to which adapters are added.

    Args:
        base: the model.
        folder: of a saved adapter, which is loaded again under each name.
    """

    def __init__(self, base: nn.Module, folder: Path):
        self.base_token = median(_seconds(lambda: _token(base)) for _ in range(REPEATS))
        self.base_batch = median(_seconds(lambda: _token(base, 8)) for _ in range(REPEATS))
        self.pool, self.folder, self.count = AdapterPool(base), folder, 0

    def load(self) -> float:
        """Load one more; the seconds that takes."""
        name = f"adapter {self.count}"
        self.count += 1
        self.pool.add(name, self.folder)

        def first_use() -> None:
            with self.pool.use(name):
                pass

        return _seconds(first_use)

    def _switch(self, number: int) -> None:
        with self.pool.use(f"adapter {number}") as model:
            _token(model)

    def _batch(self) -> None:
        with self.pool.use_batch([f"adapter {number % self.count}" for number in range(8)]) as model:
            _token(model, 8)

    def measure(self, loads: list[float]) -> dict[str, Any]:
        """Times over a token of the base; the mixed batch's over the base's batch."""
        switches = [_seconds(lambda n=n: self._switch(n % self.count)) for n in range(2 * REPEATS)]
        self._batch()
        batches = [_seconds(self._batch) for _ in range(REPEATS)]
        last = f"adapter {self.count - 1}"
        delete = _seconds(lambda: self.pool.remove(last)) if self.count > 1 else None
        if delete is not None:
            self.count -= 1
        return {
            "at": self.count + (delete is not None),
            "bytes_each": self.pool.statistics.loaded_bytes / self.count,
            "load": median(loads[-REPEATS:]) / self.base_token,
            "switch_and_token": median(switches) / self.base_token,
            "delete": None if delete is None else delete / self.base_token,
            "mixed_batch": median(batches) / self.base_batch,
        }


def serve(
    workload: Workload, counts: list[int], limit: float, progress: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Load, switch, serve and delete with growing numbers of adapters of 0.1 %, for at most ``limit`` seconds."""
    base, started, found = workload.base, time.perf_counter(), []
    with tempfile.TemporaryDirectory() as folder:
        config = SparseConfig(density=0.001, target_modules=LLAMA_TARGETS, init_weights=False, task_type="CAUSAL_LM")
        get_peft_model(workload.copy_of_base(), config).save_pretrained(folder)
        served, loads = _Served(base.eval(), Path(folder)), []
        for count in counts:
            while served.count < count and time.perf_counter() - started < limit:
                loads.append(served.load())
            found.append(served.measure(loads))
            progress(f"{found[-1]}")
            if served.count < count - 1:
                progress(f"stopped at {found[-1]['at']} adapters after {limit:.0f} s")
                break
    return found


# -------------------------------------------------------------------------------------------------------------- report


def show(content: dict[str, Any], console: Console) -> None:
    for axis, rows in content["axes"].items():
        table = Table("at", *(name for name in rows[0] if name != "at"), title=axis)
        for row in rows:
            table.add_row(*("-" if value is None else f"{value:.4g}" for value in row.values()))
        console.print(table)


def draw(content: dict[str, Any], path: Path) -> None:
    """One panel for each axis, logarithmic."""
    from matplotlib.figure import Figure  # noqa: PLC0415  (an optional package)

    axes = content["axes"]
    figure = Figure(figsize=(3.6 * len(axes), 3.6), layout="constrained")
    for panel, (axis, rows) in zip(figure.subplots(1, len(axes), squeeze=False)[0], axes.items(), strict=True):
        for name in LINES["adapters" if axis == "adapters" else "steps"]:
            points = [(row["at"], row[name]) for row in rows if row[name] is not None]
            panel.plot(*zip(*points, strict=True), marker="o", label=name.replace("_", " "))
        panel.set_xscale("log")
        panel.set_xticks([row["at"] for row in rows], [f"{row['at']:g}" for row in rows])
        panel.minorticks_off()
        panel.set_yscale("log" if axis == "adapters" else "linear")
        panel.set_xlabel(axis)
        panel.axhline(1, color="0.6", linewidth=0.8)
        panel.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(
    axes: Annotated[list[Axis] | None, typer.Option(help="By default all.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Samples of a training step.")] = 5,
    counts: Annotated[list[int] | None, typer.Option(help="Adapters; default 1, 10, 100 and 1000.")] = None,
    limit: Annotated[float, typer.Option(help="Seconds after which no adapter is loaded any more.")] = 600.0,
    small: Annotated[bool, typer.Option(help="Adapters on a random model of SmolLM2's kind in place of it.")] = False,
    output: Annotated[Path, typer.Option(help="JSON file, to which axes are added.")] = RESULTS / "growth-cpu.json",
    image: Annotated[Path | None, typer.Option(help="PNG file of all axes in the JSON file.")] = None,
) -> None:
    """Measure growth along axes, write a table and a plot."""
    torch.set_num_threads(1)
    console = Console(width=160)

    def progress(text: str) -> None:
        console.print(f"[dim]{text}")

    found: dict[str, Any] = {}
    for axis in axes or list(Axis):
        if axis is Axis.adapters:
            tiny = random_llama(64, 2, 16, CPU, torch.float32, False) if small else None
            workload = tiny or smollm2(128, CPU, torch.float32, False)
            found[axis.value] = serve(workload, counts or [1, 10, 100, 1000], limit, progress)
        else:
            found[axis.value] = grow(axis, rounds, progress)
    known = json.loads(output.read_text())["axes"] if output.exists() else {}
    content = {**environment(CPU), "rank": RANK, "rounds": rounds, "axes": {**known, **found}}
    write_json(output, content)
    show(content, console)
    draw(content, image or IMAGE)


if __name__ == "__main__":
    typer.run(main)
