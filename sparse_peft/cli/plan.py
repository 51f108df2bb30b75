"""``sparse-peft plan``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from ..planning import FORMATS, OPTIMIZERS, PlanOptions, TrainingPlan, plan_training
from ..registry import method_named
from ..structure import read_model_config
from .fields import METHOD_HELP, check_field, option_help, parse_fields
from .output import JsonOption, answering, asked, bytes_text, count_text, fields_text, seconds_text, share_text, table


def plan(
    model: Annotated[Path, typer.Argument(help="A model's folder, or its config.json.", metavar="MODEL")],
    method: Annotated[str, typer.Option(help=METHOD_HELP)] = "sparse",
    density: Annotated[float | None, typer.Option(help=option_help("density"))] = None,
    r: Annotated[int | None, typer.Option("--r", help="Rank, or LoRA-rank equivalent.")] = None,
    num_params: Annotated[int | None, typer.Option(help=option_help("num_params"))] = None,
    target_modules: Annotated[str | None, typer.Option(help="Names with commas, a pattern, or all-linear.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Another field, see `sparse-peft fields METHOD`; repeat it.",
            metavar="FIELD=VALUE",
        ),
    ] = None,
    base: Annotated[str | None, typer.Option(help=f"Frozen weights: {', '.join(FORMATS)}.")] = None,
    optimizer: Annotated[str, typer.Option(help=f"One of {', '.join(OPTIMIZERS)}.")] = "adamw",
    batch: Annotated[int, typer.Option(help="Rows of a step.")] = 1,
    length: Annotated[int, typer.Option(help="Tokens of a row.")] = 1024,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Recompute activations.")] = False,
    flops: Annotated[float | None, typer.Option(help="Operations a second; measured if not given.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    as_json: JsonOption = False,
) -> None:
    """What would train, and what a step takes: memory and time, beside LoRA and full fine-tuning. Loads no weights."""
    with answering("plan", as_json) as answer:
        with asked():
            config_class = method_named(method).config_class
            common = {"density": density, "r": r, "num_params": num_params}
            values: dict[str, Any] = {
                check_field(config_class, name): value for name, value in common.items() if value is not None
            }
            targets = [f"target_modules={target_modules}"] if target_modules is not None else []
            config = config_class(**values, **parse_fields(config_class, [*targets, *(settings or [])]))
            options = PlanOptions(base, optimizer, batch, length, checkpointing, flops, device)
            model_config = read_model_config(model)
        made = plan_training(model_config, config, options)
        answer.content = made.to_dict()
        answer.show = lambda console: show(console, made)


def show(console: Console, plan: TrainingPlan) -> None:
    """A plan for people."""
    console.print(f"[bold]{plan.architecture}[/], {count_text(plan.parameters)} parameters, {plan.base} weights")
    console.print(f"[bold]{plan.method}[/]: {escape(fields_text(plan.config))}")
    if plan.recommended_rate is not None:
        scale = "" if plan.scale is None else f"scale {plan.scale:g}, "
        console.print(f"{scale}recommended learning rate {plan.recommended_rate:.1e} with AdamW")
    console.print()
    console.print(table(*kind_table(plan), "What trains", gap=1))
    if plan.beside:
        console.print(f"and {count_text(plan.beside)} parameters outside of these layers")
    console.print()
    rows = [[label, *(text(need) for need in plan.needs)] for label, text in ROWS]
    tokens = f"{plan.batch} x {plan.length} tokens, {plan.optimizer}"
    title = f"A step of {tokens}" + (", with checkpointing" if plan.checkpointing else "")
    console.print(table(["", *(need.name for need in plan.needs)], rows, title))
    console.print()
    for sentence in plan.assumptions:
        console.print(f"[dim]- {sentence}[/]")


def kind_table(plan: TrainingPlan) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: what trains in layers of each kind; of ranks and channels what one layer has."""
    parts = [
        (name, [getattr(kind, name) // kind.layers for kind in plan.kinds])
        for name in ("ranks", "channels")
        if any(getattr(kind, name) for kind in plan.kinds)
    ]
    columns = ["layers", "n", "weight", "trained", "share", *(name for name, _ in parts)]
    rows = [
        [
            kind.kind,
            str(kind.layers),
            f"{kind.shape[0]}x{kind.shape[1]}",
            count_text(kind.trained),
            share_text(kind.density),
            *(str(numbers[i]) for _, numbers in parts),
            bytes_text(kind.adapter_bytes),
            bytes_text(kind.gradient_bytes),
            bytes_text(kind.optimizer_bytes),
        ]
        for i, kind in enumerate(plan.kinds)
    ]
    return [*columns, "adapter", "gradients", "optimizer"], rows


ROWS = (
    ("trained parameters", lambda need: count_text(need.trained)),
    ("of the model", lambda need: share_text(need.share)),
    ("frozen weights", lambda need: bytes_text(need.base_bytes)),
    ("trained weights", lambda need: bytes_text(need.trained_bytes)),
    ("positions, kept entries", lambda need: bytes_text(need.position_bytes)),
    ("gradients", lambda need: bytes_text(need.gradient_bytes)),
    ("optimizer state", lambda need: bytes_text(need.optimizer_bytes)),
    ("activations", lambda need: bytes_text(need.activation_bytes)),
    ("largest temporary", lambda need: bytes_text(need.temporary_bytes)),
    (
        "peak (estimate)",
        lambda need: bytes_text(need.peak_bytes) + ("" if need.activation_bytes is not None else " +"),
    ),
    ("floating-point operations", lambda need: count_text(need.flops)),
    ("time (estimate)", lambda need: seconds_text(need.seconds)),
    ("on disk", lambda need: bytes_text(need.file_bytes)),
)
