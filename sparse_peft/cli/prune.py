"""``sparse-peft prune``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from ..constraints import OneOf, validated
from ..sparsify import ALLOCATIONS, LAYOUTS, REFINEMENTS, SCORES, Armor, Masks, as_pattern, save_sparse
from ..sparsify import prune as prune_model
from ..sparsify.pruning import settings
from .eval import names_in
from .folders import model_folder, new_folder
from .merge import copy_companions, files_in
from .output import (
    ForceOption,
    JsonOption,
    UsageError,
    answering,
    asked,
    bytes_text,
    count_text,
    share_text,
    short_names,
    show_table,
    table,
)
from .texts import DeviceOption, DtypeOption, LengthOption, batches_of, check_place, load_language_model

MASKS, WEIGHTS = "masks.safetensors", "sparse.safetensors"
DENSE = "dense"
LISTED = 10  # layers that are listed for people

ScoreOption = Annotated[str, typer.Option(help=f"One of {', '.join(SCORES)}.")]
AllocationOption = Annotated[str, typer.Option(help=f"One of {', '.join(ALLOCATIONS)}.")]
CalibrationOption = Annotated[Path | None, typer.Option(help="A text file, for scores that need data.")]


def prune(
    model: Annotated[Path, typer.Argument(help="The model's folder.", metavar="MODEL")],
    out: Annotated[Path, typer.Argument(help="The pruned model's folder.", metavar="OUT")],
    pattern: Annotated[str, typer.Option(help="A share of zeros, or n:m for n weights kept of m.")] = "0.5",
    score: ScoreOption = "magnitude",
    allocation: AllocationOption = "uniform",
    refine: Annotated[str | None, typer.Option(help=f"One of {', '.join(REFINEMENTS)}.")] = None,
    calibration: CalibrationOption = None,
    length: LengthOption = 2048,
    sequences: Annotated[int, typer.Option(min=1, help="Most sequences of it.")] = 128,
    target_modules: Annotated[str, typer.Option(help="Names with commas; by default all linear layers.")] = "",
    exclude_modules: Annotated[str, typer.Option(help="Names with commas.")] = "",
    layout: Annotated[
        str,
        typer.Option(
            help=f"{DENSE}: the model with its zeros, for any program; {' or '.join(LAYOUTS)}: "
            f"{WEIGHTS} without them, for load_sparse."
        ),
    ] = DENSE,
    seed: Annotated[int, typer.Option(help="Of random scores.")] = 0,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Set the least important weights of a model to zero, and write it with its masks."""
    with answering("prune", as_json) as answer:
        model_folder(model)
        with asked():
            wanted = as_pattern(pattern)
            layout = validated("layout", layout, Annotated[str, OneOf((DENSE, *LAYOUTS))])
            if refine == Armor.name and layout == DENSE:
                raise UsageError(
                    f"refine={refine!r} with layout={layout!r}: a transformers checkpoint cannot hold its layers; use "
                    f"layout={LAYOUTS[0]!r}"
                )
            settings(wanted, score, allocation, refine, has_data=calibration is not None)
        check_place(dtype, device)
        data = None if calibration is None else batches_of(calibration, model, length, sequences)
        with new_folder(out, force) as staging:
            loaded = load_language_model(model, dtype, device)
            masks = prune_model(
                loaded, wanted, score, allocation=allocation, calibration=data, refine=refine, seed=seed,
                target_modules=names_in(target_modules) or None, exclude_modules=names_in(exclude_modules) or None,
                progress=not as_json,
            )  # fmt: skip
            write(loaded, masks, staging, layout)
            copied = copy_companions(model, staging)
        answer.content = {"output": str(out), **content_of(masks), **files_in(out, copied)}
        answer.show = lambda console: show(console, masks, answer.content)


def write(model: Any, masks: Masks, folder: Path, layout: str) -> None:
    """Write a pruned model's files into a folder."""
    if layout == DENSE:
        model.save_pretrained(folder)
        masks.save(folder / MASKS)
        return
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    save_sparse(model, folder / WEIGHTS, layout)


def content_of(masks: Masks) -> dict[str, Any]:
    """Masks for programs."""
    return {
        **masks.about,
        "kept": masks.kept,
        "density": masks.density,
        "layers": {name: mask.density for name, mask in masks.layers.items()},
    }


def show(console: Console, masks: Masks, content: dict[str, Any]) -> None:
    """A pruned model for people: the layers of which least stays."""
    least = sorted(masks.layers.items(), key=lambda item: item[1].density)[:LISTED]
    names = dict(zip(masks.layers, short_names(list(masks.layers)), strict=True))
    rows = [
        [names[name], f"{mask.shape[0]}x{mask.shape[1]}", count_text(mask.kept), share_text(mask.density)]
        for name, mask in least
    ]
    title = f"Least kept ({len(least)} of {len(masks.layers)} layers)"
    show_table(console, table(["layer", "weight", "kept", "share"], rows), title)
    console.print()
    console.print(f"[bold]{escape(content['output'])}[/]: {bytes_text(content['bytes'])}", soft_wrap=True)
    console.print(f"{count_text(masks.kept)} of the pruned layers' weights stay, {share_text(masks.density)}")
