"""``python -m benchmarks.sharded``: a step under FSDP2, with entries written into the processes' shards (resident) and
with entries set in copies of gathered weights (overlay), against the frozen base's step."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import typer
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_peft import SparseConfig

from .measure import Ratio, interleave, main_clock, measure_phases, paired
from .report import environment, write_json

RESULTS = Path(__file__).parent / "results"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Options:
    """Sizes of the model and of a step, and samples."""

    hidden: int
    blocks: int
    tokens: int
    density: float
    rounds: int


@dataclass
class Case:
    """One way to train. ``vs_base`` is of the first process's CPU time; ``peak`` is the allocator's, in bytes."""

    way: str
    seconds: float
    vs_base: Ratio
    peak: int


class Step:
    """A step of a model in one of the ways: ``"base"``, ``"resident"`` or ``"overlay"``."""

    def __init__(self, way: str, options: Options, ids: torch.Tensor):
        torch.manual_seed(0)
        sizes = {"hidden_size": options.hidden, "intermediate_size": 11 * options.hidden // 4}
        config = LlamaConfig(vocab_size=1024, num_hidden_layers=options.blocks, num_attention_heads=8, **sizes)
        base, self.ids = LlamaForCausalLM(config).requires_grad_(False), ids
        self.model: nn.Module = base
        if way != "base":
            fields = {"density": options.density, "target_modules": "all-linear", "resident": way == "resident"}
            self.model = get_peft_model(base, SparseConfig(**fields))
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in base.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None
        self.embedded = torch.randn(*ids.shape, options.hidden, requires_grad=True)

    def __call__(self) -> None:
        self.model(inputs_embeds=self.embedded, labels=self.ids).loss.backward()
        self.embedded.grad = None
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()


def process(rank: int, size: int, address: str, options: Options, output: Path) -> None:
    """Measure on one of the processes; the first writes the result."""
    dist.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=size)
    torch.set_num_threads(1)
    ids = torch.randint(0, 1024, (4, options.tokens // 4), generator=torch.Generator().manual_seed(rank))
    ways = ("base", "overlay", "resident")
    peaks = {}
    for way in ways:
        step = Step(way, options, ids)
        peaks[way] = measure_phases([step, step, step], CPU)[-1].peak
        del step
    steps = {way: Step(way, options, ids) for way in ways}
    samples, clock = interleave(steps, options.rounds, CPU), main_clock(CPU)
    if rank == 0:
        cases = [
            Case(
                way,
                sorted(sample.on(clock) for sample in samples[way])[options.rounds // 2],
                paired(samples[way], samples["base"], clock),
                peaks[way],
            )
            for way in ways
        ]
        found = [asdict(case) for case in cases]
        write_json(
            output, {"format": 1, **environment(CPU), "processes": size, "options": asdict(options), "cases": found}
        )
        drawn = Table(title=f"a step under FSDP2, {size} processes, {options.density:.0%} of the entries")
        for title in ("way", "seconds", "/ base", "peak, MB"):
            drawn.add_column(title, justify="right")
        for case in cases:
            ratio = f"{case.vs_base.median:.2f} ({case.vs_base.low:.2f}-{case.vs_base.high:.2f})"
            drawn.add_row(case.way, f"{case.seconds:.3f}", ratio, f"{case.peak / 1e6:.1f}")
        Console(width=120).print(drawn)
    dist.barrier()
    dist.destroy_process_group()


def main(
    processes: Annotated[int, typer.Option(min=1, help="Processes of this machine.")] = 2,
    hidden: Annotated[int, typer.Option(help="Width of the model, a multiple of 8.")] = 512,
    blocks: Annotated[int, typer.Option(min=1, help="Its blocks.")] = 4,
    tokens: Annotated[int, typer.Option(min=4, help="Tokens of a process's step.")] = 512,
    density: Annotated[float, typer.Option(help="Share of the entries that train.")] = 0.01,
    rounds: Annotated[int, typer.Option(min=1, help="Samples.")] = 15,
    output: Annotated[Path | None, typer.Option(help="JSON file; default in benchmarks/results.")] = None,
) -> None:
    """Time and memory of a step under FSDP2."""
    options, path = Options(hidden, blocks, tokens, density, rounds), output or RESULTS / "sharded-cpu.json"
    with tempfile.TemporaryDirectory() as folder:
        arguments = (processes, str(Path(folder) / "rendezvous"), options, path)
        torch.multiprocessing.spawn(process, arguments, nprocs=processes)
    Console().print(f"written: {path}")


if __name__ == "__main__":
    typer.run(main)
