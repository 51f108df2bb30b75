"""``sparse-peft inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

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
    table,
)


def inspect(
    adapter: Annotated[Path, typer.Argument(help="An adapter's folder.", metavar="ADAPTER")],
    plot: Annotated[Path | None, typer.Option(help="Draw where its entries are, a PNG file.")] = None,
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
        answer.show = lambda console: show(console, found, plot)


def show(console: Console, found: AdapterSummary, plot: Path | None = None) -> None:
    """A summary for people."""
    console.print(f"[bold]{escape(found.folder)}[/]: {found.peft_type}", soft_wrap=True)
    console.print(escape(fields_text(found.config)))
    console.print(f"for {escape(str(found.base_model or 'a base model without a name'))}", soft_wrap=True)
    console.print()
    names = short_names([layer.layer for layer in found.layers])
    used = [(title, text) for title, text in COLUMNS if any(text(layer) for layer in found.layers)]
    rows = [[name, *(text(layer) for _, text in used)] for name, layer in zip(names, found.layers, strict=True)]
    console.print(table(["layer", *(title for title, _ in used)], rows, gap=1))
    console.print()
    trained = f"{count_text(found.parameters)} parameters in {len(found.layers)} layers"
    share = share_text(found.parameters / found.weights)
    console.print(
        f"[bold]{trained}[/], {share} of their weights; norm {found.norm:.4g}; {bytes_text(found.file_bytes)}"
    )
    if found.saved_whole:
        console.print(f"saved whole: {escape(', '.join(found.saved_whole))}")
    if any(layer.rows for layer in found.layers):
        console.print("[dim]top rows, cols: share of the entries in the fullest tenth of the rows or columns[/]")
    if plot is not None:
        console.print(f"drawn: {escape(str(plot))}", soft_wrap=True)


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
