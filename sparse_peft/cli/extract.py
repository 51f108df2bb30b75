"""``sparse-peft extract``."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from ..adapters import EXTRACTION_CRITERIA, Extraction, ExtractOptions
from ..adapters import extract as extract_adapter
from ..registry import method_named
from .fields import option_help, parse_fields
from .folders import model_folder, new_folder
from .output import (
    ForceOption,
    JsonOption,
    answering,
    asked,
    count_text,
    share_text,
    short_names,
    show_table,
    table,
    working,
)

ENTRIES = method_named("sparse").config_class  # of the adapter that is written
LEAST_KEPT = 10  # layers that are listed for people


def extract(
    base: Annotated[Path, typer.Argument(help="The base model's folder.", metavar="BASE")],
    finetuned: Annotated[Path, typer.Argument(help="The fine-tuned model's folder.", metavar="FINETUNED")],
    out: Annotated[Path, typer.Argument(help="The adapter's folder.", metavar="OUT")],
    density: Annotated[float | None, typer.Option(help="Share of the target weights that is kept.")] = None,
    num_params: Annotated[int | None, typer.Option(help="Number of entries, instead.")] = None,
    r: Annotated[int | None, typer.Option("--r", help="As many as LoRA of this rank, instead.")] = None,
    allocation: Annotated[str, typer.Option(help=option_help("allocation"))] = "numel",
    criterion: Annotated[str, typer.Option(help=f"One of {', '.join(EXTRACTION_CRITERIA)}.")] = "magnitude",
    target_modules: Annotated[str, typer.Option(help="Names with commas, a pattern, or all-linear.")] = "all-linear",
    target_experts: Annotated[bool, typer.Option("--target-experts", help="Compare fused experts, too.")] = False,
    others: Annotated[str, typer.Option(help="Other tensors that differ: leave_out, save or refuse.")] = "leave_out",
    save_dtype: Annotated[str, typer.Option(help=option_help("save_dtype"))] = "float32",
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Cut the sparse adapter out of a fully fine-tuned model that takes the base model closest to it."""
    with answering("extract", as_json) as answer:
        model_folder(base), model_folder(finetuned)
        with asked():
            fields = parse_fields(ENTRIES, [f"target_modules={target_modules}", f"save_dtype={save_dtype}"])
            fields |= {"target_experts": target_experts, "others": others}
            options = ExtractOptions(density, num_params, r, None, allocation, criterion, **fields)
        with new_folder(out, force) as staging, working("comparing weights"):
            made = extract_adapter(base, finetuned, staging, options)
        answer.content = {"output": str(out), **content_of(made)}
        answer.show = lambda console: show(console, made, str(out))


def content_of(made: Extraction) -> dict[str, Any]:
    """An extraction for programs; for a tensor that the base does not have, its difference is null."""
    return {
        "entries": made.entries,
        "kept": made.kept,
        "unchanged": list(made.unchanged),
        "others": {name: square if math.isfinite(square) else None for name, square in made.others.items()},
        "saved": list(made.saved),
        "layers": [asdict(layer) for layer in made.layers],
    }


def show(console: Console, made: Extraction, out: str) -> None:
    """An extraction for people: the layers of which least was kept."""
    names = dict(
        zip([layer.name for layer in made.layers], short_names([layer.name for layer in made.layers]), strict=True)
    )
    least = sorted(made.layers, key=lambda layer: layer.kept)[:LEAST_KEPT]
    rows = [
        [
            names[layer.name],
            count_text(layer.entries),
            share_text(layer.changed / layer.size),
            share_text(layer.kept),
            str(layer.inexact),
        ]
        for layer in least
    ]
    title = f"Least kept ({len(least)} of {len(made.layers)} layers)"
    show_table(console, table(["layer", "entries", "changed", "kept", "inexact"], rows), title)
    console.print()
    console.print(f"[bold]{escape(out)}[/]: {count_text(made.entries)} entries", soft_wrap=True)
    console.print(f"they have {share_text(made.kept)} of the squared difference of the adapted layers")
    if made.unchanged:
        console.print(f"{len(made.unchanged)} target layers are unchanged and left out")
    if made.others:
        what = f"{len(made.saved)} saved whole" if made.saved else "left out"
        console.print(f"{len(made.others)} other tensors differ, {what}: {escape(', '.join(list(made.others)[:4]))}")
