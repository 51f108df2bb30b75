"""``sparse-peft plan``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ..planning import (
    FORMATS,
    GPU_SIZES,
    OPTIMIZERS,
    STRATEGIES,
    LayerKind,
    Need,
    PlanOptions,
    TrainingPlan,
    plan_training,
)
from ..registry import method_named
from ..structure import read_model_config
from .fields import METHOD_HELP, check_field, option_help, parse_fields
from .output import (
    Cell,
    JsonOption,
    answering,
    asked,
    bytes_text,
    count_text,
    fields_text,
    seconds_text,
    share_text,
    show_table,
    table,
)

GB = 1e9


def plan(
    model: Annotated[
        str, typer.Argument(help="A model's folder, its config.json, or its name on the Hub.", metavar="MODEL")
    ],
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
    processes: Annotated[int, typer.Option(help="Processes; memory is that of one of them.")] = 1,
    strategy: Annotated[str, typer.Option(help=f"One of {', '.join(STRATEGIES)}.")] = "ddp",
    memory: Annotated[float | None, typer.Option(help="GB to stay below; what needs more is marked.", min=0)] = None,
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
            options = PlanOptions(base, optimizer, batch, length, checkpointing, flops, device, processes, strategy)
            model_config = read_model_config(model)
        made = plan_training(model_config, config, options)
        over = [need.name for need in made.needs if memory is not None and need.peak_bytes > memory * GB]
        answer.content = {**made.to_dict(), "memory": memory, "over_memory": over}
        answer.show = lambda console: show(console, made, memory)


def show(console: Console, plan: TrainingPlan, memory: float | None = None) -> None:
    """A plan for people; with a limit of memory, in GB, what is over it is red and listed."""
    console.print(f"[bold]{plan.architecture}[/], {count_text(plan.parameters)} parameters, {plan.base} weights")
    console.print(f"[bold]{plan.method}[/]: {escape(fields_text(plan.config))}")
    if plan.recommended_rate is not None:
        scale = "" if plan.scale is None else f"scale [bold]{plan.scale:g}[/], "
        console.print(f"{scale}recommended learning rate [bold]{plan.recommended_rate:.1e}[/] with AdamW")
    console.print()
    show_table(console, kind_table(plan), "What trains")
    if plan.beside:
        console.print(f"and {count_text(plan.beside)} parameters outside of these layers")
    console.print()
    tokens = f"{plan.batch} x {plan.length} tokens, {plan.optimizer}"
    title = f"A step of {tokens}" + (", with checkpointing" if plan.checkpointing else "")
    title += f", on each of {plan.processes} processes ({plan.strategy})" if plan.processes > 1 else ""
    show_table(console, need_table(plan, memory), title)
    if memory is not None:
        show_limit(console, plan, memory)
    console.print()
    for sentence in plan.assumptions:
        console.print(f"[dim]- {sentence}[/]")


def need_table(plan: TrainingPlan, memory: float | None) -> Table:
    """A row for each part of the cost, a column for each way of training."""
    rows = [[label, *(_cell(label, text(need), need, memory) for need in plan.needs)] for label, text in ROWS]
    totals = [number for number, (label, _) in enumerate(ROWS) if label in TOTALS]
    return table(["", *(need.name for need in plan.needs)], rows, totals=totals)


def _cell(label: str, text: str, need: Need, memory: float | None) -> Cell:
    """The text, red where all of the memory is over the limit."""
    is_over = memory is not None and need.peak_bytes > memory * GB
    return Text(text, style="red") if is_over and label in (PEAK, GPU) else text


def show_limit(console: Console, plan: TrainingPlan, memory: float) -> None:
    """Which ways of training need more than the limit, and what needs less."""
    over = {need.name: need.peak_bytes - memory * GB for need in plan.needs if need.peak_bytes > memory * GB}
    if not over:
        console.print(f"[green]all of them stay below {memory:g} GB[/]")
        return
    amounts = ", ".join(f"{name} by {bytes_text(amount)}" for name, amount in over.items())
    console.print(f"[red]over {memory:g} GB: {amounts}[/]")
    less = ["--base nf4"] * (not FORMATS[plan.base].is_quantised) + ["--checkpointing"] * (not plan.checkpointing)
    console.print(f"[dim]{', '.join([*less, 'a smaller --batch or --length'])} need less[/]")


def kind_table(plan: TrainingPlan) -> Table:
    """A row for layers of each kind, and one for all; of ranks and channels what one layer has."""
    parts = [name for name in ("ranks", "channels") if any(getattr(kind, name) for kind in plan.kinds)]
    columns = ["layers", "n", "weight", "trained", "share", *parts, "adapter", "gradients", "optimizer"]
    rows = [
        [
            kind.kind,
            str(kind.layers),
            f"{kind.shape[0]}x{kind.shape[1]}",
            *_sizes_of([kind], [str(getattr(kind, name) // kind.layers) for name in parts]),
        ]
        for kind in plan.kinds
    ]
    if len(rows) > 1:
        rows.append(
            ["all", str(sum(kind.layers for kind in plan.kinds)), "", *_sizes_of(plan.kinds, [""] * len(parts))]
        )
    return table(columns, rows, gap=1, totals=[-1] if len(rows) > 1 else [])


def _sizes_of(kinds: Sequence[LayerKind], parts: Sequence[str]) -> list[str]:
    """Cells of what trains in layers of some kinds."""
    trained = sum(kind.trained for kind in kinds)
    weights = sum(kind.layers * kind.shape[0] * kind.shape[1] for kind in kinds)
    density = kinds[0].density if len(kinds) == 1 else trained / weights
    amounts = (sum(getattr(kind, f"{name}_bytes") for kind in kinds) for name in ("adapter", "gradient", "optimizer"))
    return [count_text(trained), share_text(density), *parts, *map(bytes_text, amounts)]


def _gpu(need: Need) -> str:
    if need.smallest_gpu is not None:
        return f"{need.smallest_gpu} GB"
    return "?" if need.activation_bytes is None else f"over {GPU_SIZES[-1]} GB"


def _peak(need: Need) -> str:
    return bytes_text(need.peak_bytes) + ("" if need.activation_bytes is not None else " +")


TRAINED, PEAK, GPU = "trained parameters", "peak (estimate)", "smallest GPU"
TOTALS = (TRAINED, PEAK, GPU)
ROWS: tuple[tuple[str, Callable[[Need], str]], ...] = (
    (TRAINED, lambda need: count_text(need.trained)),
    ("of the model", lambda need: share_text(need.share)),
    ("frozen weights", lambda need: bytes_text(need.base_bytes)),
    ("trained weights", lambda need: bytes_text(need.trained_bytes)),
    ("positions, kept entries", lambda need: bytes_text(need.position_bytes)),
    ("gradients", lambda need: bytes_text(need.gradient_bytes)),
    ("optimizer state", lambda need: bytes_text(need.optimizer_bytes)),
    ("activations", lambda need: bytes_text(need.activation_bytes)),
    ("largest temporary", lambda need: bytes_text(need.temporary_bytes)),
    (PEAK, _peak),
    (GPU, _gpu),
    ("floating-point operations", lambda need: count_text(need.flops)),
    ("time (estimate)", lambda need: seconds_text(need.seconds)),
    ("on disk", lambda need: bytes_text(need.file_bytes)),
)
