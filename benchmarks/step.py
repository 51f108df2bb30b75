"""``python -m benchmarks.step``: what a step costs, against LoRA, full fine-tuning and the frozen model."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from .goals import judge
from .methods import FULL, Method, dropout_name, lora_name, methods, shira_name
from .report import environment, show, to_json, write_json
from .runner import run_workload
from .workloads import Workload, linear_stack, random_llama, smollm2

RESULTS = Path(__file__).parent / "results"
DENSITIES = [0.001, 0.005, 0.01, 0.05]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Model(str, Enum):  # noqa: UP042
    synthetic = "synthetic"
    llama = "llama"
    smollm2 = "smollm2"


def _workloads(
    model: Model,
    d: list[int],
    depth: int,
    tokens: list[int],
    device: torch.device,
    dtype: torch.dtype,
    checkpointing: bool,
    nf4: bool,
) -> Iterator[Workload]:
    if checkpointing and model is Model.synthetic:
        raise typer.BadParameter("the synthetic stack has no gradient checkpointing; use --model llama or smollm2")
    if nf4 and model is not Model.synthetic:
        raise typer.BadParameter("--nf4 is for the synthetic stack")
    for count in tokens:
        if model is Model.smollm2:
            yield smollm2(count, device, dtype, checkpointing)
            continue
        for size in d:
            if model is Model.llama:
                yield random_llama(size, depth, count, device, dtype, checkpointing)
            else:
                yield linear_stack(size, depth, count, device, dtype, nf4)


def _chosen(rows: list[Method], only: list[str] | None) -> list[Method]:
    unknown = sorted(set(only or ()) - {row.name for row in rows})
    if unknown:
        raise typer.BadParameter(f"--only {unknown}: choose among {', '.join(row.name for row in rows)}")
    return [row for row in rows if not only or row.name in only]


def main(
    model: Annotated[Model, typer.Option(help="Linear layers, a random Llama, or SmolLM2-135M.")] = Model.synthetic,
    d: Annotated[
        list[int] | None, typer.Option(help="Hidden sizes (synthetic, llama); default 1024 and 2048.")
    ] = None,
    depth: Annotated[int, typer.Option(min=1, help="Layers (synthetic, llama).")] = 4,
    tokens: Annotated[list[int] | None, typer.Option(min=2, help="Tokens of a step; default 512.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Samples of a training step.")] = 9,
    densities: Annotated[list[float] | None, typer.Option(help="Default 0.001, 0.005, 0.01 and 0.05.")] = None,
    rank: Annotated[int, typer.Option(min=1, help="LoRA's rank, and the budget of the rows named after it.")] = 16,
    only: Annotated[list[str] | None, typer.Option(help="Rows to run; frozen and LoRA are needed.")] = None,
    together: Annotated[
        int | None, typer.Option(min=1, help="Models alive at once beside frozen and LoRA; default 1 for smollm2.")
    ] = None,
    checkpointing: Annotated[bool, typer.Option(help="Gradient checkpointing (llama, smollm2).")] = False,
    nf4: Annotated[bool, typer.Option(help="A base in bitsandbytes' NF4 (synthetic): LoRA is QLoRA.")] = False,
    serving: Annotated[bool, typer.Option(help="Measure decoding and switching, too.")] = True,
    threads: Annotated[int, typer.Option(min=1, help="PyTorch's threads.")] = 1,
    device: Annotated[str | None, typer.Option(help="Default cuda where there is one, else cpu.")] = None,
    dtype: Annotated[str, typer.Option(help="The base model's: float32, bfloat16 or float16.")] = "float32",
    output: Annotated[
        Path | None, typer.Option(help="JSON file; default benchmarks/results/step-<model>.json.")
    ] = None,
    check: Annotated[bool, typer.Option(help="Exit with 1 if a goal is missed.")] = False,
) -> None:
    """Time and memory of a training step, of decoding and of switching adapters, method against method.

    Every timed action runs once a round; ratios are paired within a round. On the CPU the time is the process's own.
    """
    if dtype not in DTYPES:
        raise typer.BadParameter(f"--dtype {dtype}: choose one of {', '.join(DTYPES)}")
    torch.set_num_threads(threads)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    rows = [row for row in _chosen(methods(rank, densities or DENSITIES), only) if row.takes_quantised or not nf4]
    others = {"full": FULL, "dropout": dropout_name(rank), "shira": shira_name(rank)}
    serving = serving and not nf4  # merging into a quantised base quantises again: no switch to compare
    alive = together or (1 if model is Model.smollm2 else None)
    console = Console(width=220)
    workloads = _workloads(model, d or [1024, 2048], depth, tokens or [512], where, DTYPES[dtype], checkpointing, nf4)

    def progress(text: str) -> None:
        console.print(f"[dim]{text}")

    results = [
        run_workload(workload, rows, lora_name(rank), rounds, where, alive, progress, serving, others)
        for workload in workloads
    ]
    verdicts = [judge(result) for result in results]
    show(results, verdicts, console)
    options = {"model": model.value, "rounds": rounds, "rank": rank, "dtype": dtype, "checkpointing": checkpointing}
    path = output or RESULTS / f"step-{model.value}.json"
    write_json(path, to_json(results, verdicts, options, environment(where)))
    console.print(f"written: {path}")
    if check and not all(verdict.passed for judged in verdicts for verdict in judged):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
