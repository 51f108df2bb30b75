"""``python -m benchmarks.dynamic``: do positions that change during training beat positions that stay?

A real language model on a real text: every method trains the same number of entries on the same batches with the same
optimizer, over several seeds (of the data's order and of the first positions). Entries that are chosen by their
gradient want smaller steps than random ones, so each method first finds the best of a few learning rates, on other
text and with another seed. The result is the loss on held-out text.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import typer
from peft import get_peft_model
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from examples.smollm2 import held_out_loss, kjv_blocks, load_model, load_tokenizer
from sparse_peft import SparseConfig, SparsityController

from .report import environment, write_json

RESULTS = Path(__file__).parent / "results" / "dynamic-smollm2-cpu.json"
STATIC = "random"
METHODS = (STATIC, "set", "rigl", "momentum", "accumulated_gradient")
LEARNING_RATES = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1]
TUNING_SEED = 1000


@dataclass(frozen=True)
class Run:
    """One training run: where it ended, what it cost, and how much it turned over."""

    method: str
    seed: int
    learning_rate: float
    start: float
    loss: float
    seconds: float
    reselections: int
    replaced: int
    entries: int
    curve: list[float] = field(default_factory=list)


def config_of(method: str, density: float, every: int, accumulate: int, seed: int) -> SparseConfig:
    window = {"set": 0, "rigl": 1}.get(method, accumulate)
    changing = {} if method == STATIC else {"reselect_every": every, "accumulate": window}
    return SparseConfig(
        selection=method,
        density=density,
        scale=1.0,
        seed=seed,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        **changing,
    )


def train(
    model: nn.Module,
    config: SparseConfig,
    batch_at: Callable[[int], Tensor],
    evaluate: Callable[[nn.Module], float],
    steps: int,
    learning_rate: float,
    seed: int,
) -> Run:
    """Adapt ``model``, train it, and give it back as it was."""
    peft_model = get_peft_model(model, config)
    values = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(values, lr=learning_rate, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    controller = SparsityController(peft_model, optimizer, total_steps=steps)
    start = evaluate(peft_model)
    curve = []
    peft_model.train()
    began = time.perf_counter()
    for step in range(steps):
        batch = batch_at(step)
        loss = peft_model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        controller.step()
        decay.step()
        optimizer.zero_grad()
        curve.append(loss.item())
    seconds = time.perf_counter() - began
    controller.close()
    history = controller.history
    run = Run(
        config.selection,
        seed,
        learning_rate,
        start,
        evaluate(peft_model),
        seconds,
        len(history),
        sum(record.replaced for record in history),
        sum(value.numel() for value in values),
        curve,
    )
    peft_model.unload()
    return run


def downhill(rates: list[float], loss: Callable[[float], float]) -> float:
    """The rate, from the middle on, that is better than both its neighbours; ``rates`` ascend."""
    at = len(rates) // 2
    while True:
        near = [i for i in (at - 1, at, at + 1) if 0 <= i < len(rates)]
        best = min(near, key=lambda i: loss(rates[i])) if len(rates) > 1 else at
        if best == at:
            return rates[at]
        at = best


@dataclass(frozen=True)
class Comparison:
    """One method against static positions: paired differences of the held-out loss over the seeds."""

    method: str
    learning_rate: float
    loss: float
    spread: float
    difference: float
    difference_spread: float
    seconds: float


def compare(runs: list[Run]) -> list[Comparison]:
    """Means over the seeds, and differences to the static run of the same seed."""
    static = {run.seed: run for run in runs if run.method == STATIC}
    rows = []
    for method in dict.fromkeys(run.method for run in runs):
        mine = [run for run in runs if run.method == method]
        differences = [run.loss - static[run.seed].loss for run in mine]
        spread = [stdev(numbers) if len(mine) > 1 else 0.0 for numbers in ([r.loss for r in mine], differences)]
        ratio = mean(run.seconds / static[run.seed].seconds for run in mine)
        rows.append(
            Comparison(
                method,
                mine[0].learning_rate,
                mean(run.loss for run in mine),
                spread[0],
                mean(differences),
                spread[1],
                ratio,
            )
        )
    return rows


def show(console: Console, rows: list[Comparison], runs: list[Run]) -> None:
    table = Table(title=f"held-out loss from {mean(run.start for run in runs):.4f}; {runs[0].entries:,} entries")
    for name in ("positions", "lr", "held-out loss", "- random, same seed", "time / random", "replaced"):
        table.add_column(name, justify="left" if name == "positions" else "right", no_wrap=True)
    for row in rows:
        replaced = mean(run.replaced / run.entries for run in runs if run.method == row.method)
        table.add_row(
            row.method,
            f"{row.learning_rate:g}",
            f"{row.loss:.4f} ± {row.spread:.4f}",
            f"{row.difference:+.4f} ± {row.difference_spread:.4f}",
            f"{row.seconds:.2f}",
            f"{replaced:.2f} x",
        )
    console.print(table)


def main(
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of a run.")] = 60,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each method.")] = 3,
    density: Annotated[float, typer.Option(help="Share of the linear layers' weights that trains.")] = 0.005,
    reselect_every: Annotated[int, typer.Option(min=1)] = 10,
    accumulate: Annotated[int, typer.Option(min=1, help="Window of the SpIEL methods.")] = 3,
    learning_rates: Annotated[list[float] | None, typer.Option(help="To choose from; a single one is taken.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Blocks of a step.")] = 2,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a block.")] = 96,
    held_out: Annotated[int, typer.Option(min=1, help="Blocks of held-out text.")] = 32,
    only: Annotated[list[str] | None, typer.Option(help="Methods to run; random is needed.")] = None,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = RESULTS,
) -> None:
    """Train SmolLM2-135M on the King James Bible with each method and compare the losses on held-out text."""
    methods = [method for method in METHODS if not only or method in only]
    if only and (set(only) - set(METHODS) or STATIC not in only):
        raise typer.BadParameter(f"--only {only}: random and others of {', '.join(METHODS)}")
    console = Console()
    tokenizer, model = load_tokenizer(), load_model()
    blocks = kjv_blocks(tokenizer, length, limit=max(400, steps * batch))
    unseen = kjv_blocks(tokenizer, length, "heldout", limit=held_out + held_out // 2)
    unseen, other = unseen[:held_out], unseen[held_out:]
    rates = learning_rates or LEARNING_RATES

    def run_once(method: str, seed: int, rate: float, text: list[list[int]]) -> Run:
        order = random.Random(seed).sample(range(len(blocks)), steps * batch)

        def batch_at(step: int) -> Tensor:
            return torch.tensor([blocks[i] for i in order[step * batch : (step + 1) * batch]])

        config = config_of(method, density, reselect_every, accumulate, seed)
        run = train(model, config, batch_at, lambda m: held_out_loss(m, text), steps, rate, seed)
        console.print(f"{method}, seed {seed}, lr {rate:g}: {run.start:.4f} -> {run.loss:.4f} in {run.seconds:.0f} s")
        return run

    tuning: dict[tuple[str, float], Run] = {}

    def tuned(method: str, rate: float) -> float:
        if (method, rate) not in tuning:
            tuning[method, rate] = run_once(method, TUNING_SEED, rate, other)
        return tuning[method, rate].loss

    best = {method: downhill(sorted(rates), lambda rate, method=method: tuned(method, rate)) for method in methods}
    jobs = [(method, seed) for seed in range(seeds) for method in methods]
    runs = [run_once(method, seed, best[method], unseen) for method, seed in track(jobs, "training", console=console)]
    rows = compare(runs)
    show(console, rows, runs)
    options = {
        "steps": steps, "density": density, "reselect_every": reselect_every, "accumulate": accumulate,
        "learning_rates": rates, "batch": batch, "length": length, "held_out_blocks": held_out,
    }  # fmt: skip
    write_json(
        out,
        {
            "format": 1,
            "environment": environment(torch.device("cpu")),
            "options": options,
            "rows": [asdict(row) for row in rows],
            "runs": [asdict(run) for run in runs],
            "tuning": [asdict(run) for run in tuning.values()],
        },
    )


if __name__ == "__main__":
    typer.run(main)
