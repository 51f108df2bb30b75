"""``python -m benchmarks.procedures``: what procedures around an adapter cost, in time and memory of a training step.

A random language model of 4 blocks trains with LoRA and with a sparse delta of as many parameters. Each procedure runs
periods of ten steps, what it measures in between included, in rounds that alternate with the same training without it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_peft import SparseConfig, SparsityController
from sparse_peft.procedures import (
    FisherAnchor,
    GradientMask,
    ImportanceLearningRate,
    LayerSampling,
    Procedure,
    SplitMerge,
)

from .measure import Ratio, interleave, main_clock, measure_phases, paired
from .report import environment, write_json

RESULTS = Path(__file__).parent / "results" / "procedures-cpu.json"
PERIOD = 10
PROFILED = 2  # steps whose memory is recorded, after as many
VOCABULARY = 1000
CONFIGS: dict[str, Callable[[], Any]] = {
    "lora": lambda: LoraConfig(r=16, target_modules="all-linear"),
    "sparse": lambda: SparseConfig(r=16, target_modules="all-linear"),
}


def procedures(batch: dict[str, torch.Tensor]) -> dict[str, list[Procedure]]:
    """Rows; the first is the training without any."""
    return {
        "none": [],
        "LayerSampling ist": [LayerSampling("ist", batches=[batch])],
        "LayerSampling random": [LayerSampling("random")],
        "LayerSampling lisa, offload": [LayerSampling("lisa", offload=True)],
        "SplitMerge": [SplitMerge(4)],
        "SplitMerge lazy": [SplitMerge(4, lazy=True)],
        "ImportanceLearningRate": [ImportanceLearningRate([batch], every=100)],
        "FisherAnchor": [FisherAnchor([batch])],
        "GradientMask": [GradientMask(0.8)],
    }


@dataclass(frozen=True)
class Cost:
    """Cost of one procedure.

    Attributes:
        step: CPU time of a period relative to the training without it.
        peak: bytes above the model and adapter at the peak of a period.
        held: bytes held between steps, such as the optimizer's state.
    """

    adapter: str
    procedure: str
    step: Ratio
    peak: int
    held: int


def _model(width: int, blocks: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=blocks,
            num_attention_heads=4, use_cache=False,
        )
    )  # fmt: skip


def _steps(base: nn.Module, adapter: str, batch: dict[str, torch.Tensor], around: list[Procedure], count: int) -> Any:
    """A function that trains for a number of steps."""
    model: Any = get_peft_model(copy.deepcopy(base), CONFIGS[adapter]())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    controller = SparsityController(model, optimizer, procedures=around)

    def run() -> None:
        for _ in range(count):
            model(**batch).loss.backward()
            optimizer.step()
            controller.step()
            optimizer.zero_grad()

    return run


def measure(adapter: str, width: int, blocks: int, tokens: int, rounds: int) -> list[Cost]:
    """Every procedure on one adapter."""
    device, base = torch.device("cpu"), _model(width, blocks)
    ids = torch.randint(0, VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}
    rows = procedures(batch)
    actions = {name: _steps(base, adapter, batch, around, PERIOD) for name, around in rows.items()}
    samples = interleave(actions, rounds, device, warmup=1)
    # what LayerSampling's measurements take is below a training pass, which keeps activations
    steps = {name: _steps(base, adapter, batch, around, PROFILED) for name, around in rows.items()}
    phases = {name: measure_phases([action, action], device)[1] for name, action in steps.items()}
    clock = main_clock(device)
    return [
        Cost(
            adapter, name, paired(samples[name], samples["none"], clock), phases[name].peak, phases[name].end
        )
        for name in rows
    ]  # fmt: skip


def main(
    width: Annotated[int, typer.Option(min=8, help="Hidden size; a multiple of 4.")] = 256,
    blocks: Annotated[int, typer.Option(min=2, help="Of the model.")] = 4,
    tokens: Annotated[int, typer.Option(min=2, help="Of a step.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="Periods of ten steps.")] = 2,
    out: Annotated[Path, typer.Option(help="JSON file.")] = RESULTS,
) -> None:
    """Measure every procedure on LoRA and on a sparse delta."""
    table = Table(title=f"{blocks} blocks of width {width}, {tokens} tokens")
    for name in ("adapter", "procedure", "step", "+-", "peak MB", "held MB"):
        table.add_column(name, justify="left" if name in ("adapter", "procedure") else "right")
    costs = [cost for adapter in CONFIGS for cost in measure(adapter, width, blocks, tokens, rounds)]
    for cost in costs:
        table.add_row(
            cost.adapter, cost.procedure, f"{cost.step.median:.3f}", f"{cost.step.error:.3f}",
            f"{cost.peak / 1e6:.1f}", f"{cost.held / 1e6:.1f}",
        )  # fmt: skip
    Console(width=100).print(table)
    options = {"width": width, "blocks": blocks, "tokens": tokens, "rounds": rounds, "period": PERIOD}
    write_json(
        out,
        {
            "format": 1,
            "environment": environment(torch.device("cpu")),
            "options": options,
            "costs": [asdict(cost) for cost in costs],
        },
    )


if __name__ == "__main__":
    typer.run(main)
