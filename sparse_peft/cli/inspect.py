"""``sparse-peft inspect``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..adapters import AdapterSummary, LayerSummary, read_stored, summarise, supports_of
from ..report import plot_supports
from .folders import adapter_folder, check_output
from .output import (
    ForceOption,
    JsonOption,
    answering,
    bytes_text,
    count_text,
    fields_text,
    progress,
    share_text,
    short_names,
    show_table,
    table,
)

MOST_LISTED = 30  # layers that are listed one by one


def inspect(
    adapter: Annotated[Path, typer.Argument(help="An adapter's folder.", metavar="ADAPTER")],
    plot: Annotated[Path | None, typer.Option(help="Draw where its entries are, a PNG file.")] = None,
    layers: Annotated[
        bool, typer.Option("--layers", help=f"List all layers, where there are more than {MOST_LISTED}.")
    ] = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """What an adapter has in it, layer by layer. Its base model is not needed."""
    with answering("inspect", as_json) as answer:
        folder = adapter_folder(adapter)
        if plot is not None:
            check_output(plot, force)
        found = summarise(folder, lambda layers: progress(layers, "layers"))
        if plot is not None:
            plot_supports(supports_of(read_stored(folder)), plot)
        answer.content = {**found.to_dict(), "plot": None if plot is None else str(plot)}
        answer.show = lambda console: show(console, found, plot, layers)


def show(console: Console, found: AdapterSummary, plot: Path | None = None, all_layers: bool = False) -> None:
    """A summary for people: of each layer, or of the layers of one kind together where there are many."""
    console.print(f"[bold]{escape(found.folder)}[/]: {found.peft_type}", soft_wrap=True)
    console.print(escape(fields_text(found.config)))
    console.print(f"for {escape(str(found.base_model or 'a base model without a name'))}", soft_wrap=True)
    console.print()
    if all_layers or len(found.layers) <= MOST_LISTED:
        show_table(console, layer_table(found.layers))
    else:
        show_table(console, kind_table(found.layers))
        console.print("[dim]layers of one kind together; --layers lists all[/]")
    console.print()
    trained = f"{count_text(found.parameters)} parameters in {len(found.layers)} layers"
    share = share_text(found.parameters / found.weights)
    console.print(
        f"[bold]{trained}[/], {share} of their weights; norm {found.norm:.4g}; {bytes_text(found.file_bytes)}"
    )
    if found.saved_whole:
        console.print(f"saved whole: {escape(', '.join(found.saved_whole))}")
    if any(layer.rows for layer in found.layers) and (all_layers or len(found.layers) <= MOST_LISTED):
        console.print("[dim]top rows, cols: share of the entries in the fullest tenth of the rows or columns[/]")
    if plot is not None:
        console.print(f"drawn: {escape(str(plot))}", soft_wrap=True)


def layer_table(layers: Sequence[LayerSummary]) -> Table:
    """A row for each layer."""
    names = short_names([layer.layer for layer in layers])
    used = [(title, text) for title, text in COLUMNS if any(text(layer) for layer in layers)]
    rows = [[name, *(text(layer) for _, text in used)] for name, layer in zip(names, layers, strict=True)]
    return table(["layer", *(title for title, _ in used)], rows, gap=1)


def kind_table(layers: Sequence[LayerSummary]) -> Table:
    """A row for the layers whose names differ in numbers only."""
    kinds: dict[str, list[LayerSummary]] = {}
    for name, layer in zip(short_names([layer.layer for layer in layers]), layers, strict=True):
        kind = ".".join(part for part in name.split(".") if not part.isdigit())
        kinds.setdefault(kind or name, []).append(layer)
    rows = [_kind_row(kind, alike) for kind, alike in kinds.items()]
    return table(["layers", "n", "weight", "parameters", "share", "norm", "max"], rows, gap=1)


def _kind_row(kind: str, layers: Sequence[LayerSummary]) -> list[str]:
    shapes = {f"{layer.shape[0]}x{layer.shape[1]}" for layer in layers}
    parameters = sum(layer.parameters for layer in layers)
    size = sum(layer.shape[0] * layer.shape[1] for layer in layers)
    largest = [layer.largest for layer in layers if layer.largest is not None]
    return [
        kind,
        str(len(layers)),
        shapes.pop() if len(shapes) == 1 else "various",
        count_text(parameters),
        share_text(parameters / size),
        _number(math.hypot(*(layer.norm for layer in layers))),
        _number(max(largest, default=None)),
    ]


def _ranks(layer: LayerSummary) -> str:
    if layer.rank is None:
        return ""
    return str(layer.rank) if layer.alive == layer.rank else f"{layer.alive}/{layer.rank}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


COLUMNS = (
    ("weight", lambda layer: f"{layer.shape[0]}x{layer.shape[1]}"),
    ("entries", lambda layer: "" if layer.entries is None else count_text(layer.entries)),
    ("rank", _ranks),
    ("share", lambda layer: share_text(layer.density)),
    ("norm", lambda layer: _number(layer.norm)),
    ("max", lambda layer: _number(layer.largest)),
    ("rows", lambda layer: "" if layer.rows is None else str(layer.rows)),
    ("cols", lambda layer: "" if layer.cols is None else str(layer.cols)),
    ("top rows", lambda layer: "" if layer.row_share is None else f"{layer.row_share:.0%}"),
    ("cols", lambda layer: "" if layer.col_share is None else f"{layer.col_share:.0%}"),
)
