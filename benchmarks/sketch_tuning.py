"""``python -m benchmarks.sketch_tuning``: fine-tuning a real model whose weights are written in few bits.

SketchTune's tables in the place of the weights, LoRA on bitsandbytes' NF4 (QLoRA), and SketchTune's tables on the same
NF4 codes train for equal steps on the same batches. Each first finds the best of a few learning rates, on other text
and with another seed. Measured are the loss on held-out text, the bytes that live between steps, and what a step adds.
"""

from __future__ import annotations

import copy
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Annotated

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import typer
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from examples.smollm2 import held_out_loss, kjv_blocks, load_model, load_tokenizer
from sparse_peft import SketchConfig, sketch_model

from .dynamic import downhill
from .held_out import as_batches
from .measure import bytes_of, measure_phases
from .report import environment, write_json
from .workloads import LLAMA_TARGETS, quantise_nf4

RESULTS = Path(__file__).parent / "results" / "sketch-tuning-smollm2-cpu.json"
CPU = torch.device("cpu")
IN_PLACE, QLORA, ON_NF4 = METHODS = ("sketch in place", "QLoRA", "sketch on NF4")
LEARNING_RATES = {
    IN_PLACE: [1e-5, 3e-5, 1e-4, 3e-4, 1e-3],
    QLORA: [1e-4, 3e-4, 1e-3, 3e-3, 1e-2],
    ON_NF4: [3e-4, 1e-3, 3e-3, 1e-2, 3e-2],
}
TUNING_SEED = 1000


@dataclass(frozen=True)
class Run:
    """One training run: where it began and ended."""

    method: str
    seed: int
    learning_rate: float
    start: float
    loss: float
    cpu_seconds_per_step: float
    curve: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Memory:
    """Bytes of a method's tensors between steps, in parts, and the most that a step adds to them."""

    method: str
    trained: int
    base: int
    adapter: int
    optimizer: int
    peak_extra: int


class Trainee:
    """A method's model, made anew from the dense one, and its optimizer."""

    def __init__(self, method: str, dense: nn.Module, sketched: SketchConfig, rank: int, seed: int, rate: float):
        torch.manual_seed(seed)
        base = copy.deepcopy(dense)
        if method == IN_PLACE:
            config = copy.copy(sketched)
        else:
            base = quantise_nf4(base, torch.float32, LLAMA_TARGETS)
            config = SketchConfig(bits=4, target_modules=LLAMA_TARGETS)
        if method == QLORA:
            config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LLAMA_TARGETS)
        self.model = get_peft_model(base, config)
        self.values = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.values, lr=rate, weight_decay=0.0)

    def step(self, batch: Tensor) -> float:
        loss = self.model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def tensors_of(model: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers, what bitsandbytes keeps beside its weights, and tensors that are plain attributes."""
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        holders = [module]
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        while state is not None:
            holders.append(state)
            state = getattr(state, "state2", None)
        for holder in holders:
            yield from (value for value in vars(holder).values() if isinstance(value, Tensor))


def train(trainee: Trainee, batch_at: Callable[[int], Tensor], steps: int) -> tuple[list[float], float]:
    """The losses, and CPU seconds a step; the rate falls to zero."""
    decay = torch.optim.lr_scheduler.LambdaLR(trainee.optimizer, lambda step: 1 - step / steps)
    trainee.model.train()
    curve, began = [], time.process_time()
    for step in range(steps):
        curve.append(trainee.step(batch_at(step)))
        decay.step()
    return curve, (time.process_time() - began) / steps


def memory(method: str, trainee: Trainee, batch: Tensor) -> Memory:
    """Of a step after the first, which makes the optimizer's state."""
    trainee.model.train()
    _, phase = measure_phases([lambda: trainee.step(batch)] * 2, CPU)
    adapter = bytes_of(trainee.values)
    states = trainee.optimizer.state.values()
    return Memory(
        method,
        sum(value.numel() for value in trainee.values),
        bytes_of(tensors_of(trainee.model)) - adapter,
        adapter,
        bytes_of(value for state in states for value in state.values() if isinstance(value, Tensor)),
        phase.peak - phase.start,
    )


def show(console: Console, runs: list[Run], memories: list[Memory]) -> None:
    table = Table(title="SmolLM2-135M on the King James Bible, 4-bit weights")
    columns = ("method", "lr", "from", "held-out loss", "CPU s / step", "trained", "base MB", "adapter MB", "Adam MB")
    for name in (*columns, "step adds MB"):
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    for cost in memories:
        mine = [run for run in runs if run.method == cost.method]
        table.add_row(
            cost.method,
            f"{mine[0].learning_rate:g}",
            f"{mine[0].start:.4f}",
            f"{mean(run.loss for run in mine):.4f} ({', '.join(f'{run.loss:.4f}' for run in mine)})",
            f"{mean(run.cpu_seconds_per_step for run in mine):.2f}",
            f"{cost.trained:,}",
            *(f"{size / 1e6:.1f}" for size in (cost.base, cost.adapter, cost.optimizer, cost.peak_extra)),
        )
    console.print(table)


def main(
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of a run.")] = 60,
    tuning_steps: Annotated[
        int | None, typer.Option(help="Of the runs that find the rate; as many by default.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each method.")] = 2,
    groups: Annotated[int, typer.Option(min=1, help="Tables in a row of the sketch in place.")] = 1,
    rank: Annotated[int, typer.Option(min=1, help="LoRA's.")] = 16,
    calibration: Annotated[int, typer.Option(min=1, help="Blocks of training text that the sketch sees.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Blocks of a step.")] = 2,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a block.")] = 96,
    held_out: Annotated[int, typer.Option(min=1, help="Blocks of held-out text.")] = 32,
    only: Annotated[list[str] | None, typer.Option(help="Methods to run.")] = None,
    out: Annotated[Path, typer.Option(help="Where the figures go, after each run.")] = RESULTS,
) -> None:
    """Fine-tune SmolLM2-135M, its linear layers in 4 bits, on the King James Bible."""
    methods = [method for method in METHODS if not only or method in only]
    if set(only or ()) - set(METHODS):
        raise typer.BadParameter(f"--only {only}: some of {', '.join(map(repr, METHODS))}")
    console = Console()
    tokenizer, model = load_tokenizer(), load_model()
    blocks = kjv_blocks(tokenizer, length, limit=calibration + max(400, steps * batch))
    seen, blocks = blocks[:calibration], blocks[calibration:]
    unseen = kjv_blocks(tokenizer, length, "heldout", limit=held_out + held_out // 2)
    unseen, other = unseen[:held_out], unseen[held_out:]
    sketched = SketchConfig(mode="replace", bits=4, groups=groups, target_modules=LLAMA_TARGETS)
    if IN_PLACE in methods:
        sketched = sketch_model(model, sketched, as_batches(seen, 8))
    runs: list[Run] = []
    tuning: dict[tuple[str, float], Run] = {}
    memories: list[Memory] = []

    def save() -> None:
        write_json(
            out,
            {
                "format": 1,
                "environment": environment(CPU),
                "options": {
                    "steps": steps, "tuning_steps": tuning_steps or steps, "groups": groups, "rank": rank,
                    "calibration_blocks": calibration, "batch": batch, "length": length, "held_out_blocks": held_out,
                    "learning_rates": {method: LEARNING_RATES[method] for method in methods},
                },
                "memory": [asdict(cost) for cost in memories],
                "runs": [asdict(run) for run in runs],
                "tuning": [asdict(run) for run in tuning.values()],
            },
        )  # fmt: skip

    def run_once(method: str, seed: int, rate: float, text: list[list[int]], steps: int) -> Run:
        order = random.Random(seed).sample(range(len(blocks)), steps * batch)

        def batch_at(step: int) -> Tensor:
            return torch.tensor([blocks[i] for i in order[step * batch : (step + 1) * batch]])

        trainee = Trainee(method, model, sketched, rank, seed, rate)
        if all(cost.method != method for cost in memories):
            start = held_out_loss(trainee.model, text)
            memories.append(memory(method, trainee, batch_at(0)))
            trainee = Trainee(method, model, sketched, rank, seed, rate)
        else:
            start = held_out_loss(trainee.model, text)
        curve, seconds = train(trainee, batch_at, steps)
        run = Run(method, seed, rate, start, held_out_loss(trainee.model, text), seconds, curve)
        console.print(f"{method}, seed {seed}, lr {rate:g}: {run.start:.4f} -> {run.loss:.4f}, {seconds:.1f} s a step")
        return run

    def tuned(method: str, rate: float) -> float:
        if (method, rate) not in tuning:
            tuning[method, rate] = run_once(method, TUNING_SEED, rate, other, tuning_steps or steps)
            save()
        return tuning[method, rate].loss

    for method in methods:
        best = downhill(LEARNING_RATES[method], lambda rate, method=method: tuned(method, rate))
        for seed in range(seeds):
            runs.append(run_once(method, seed, best, unseen, steps))
            save()
    show(console, runs, memories)


if __name__ == "__main__":
    typer.run(main)
