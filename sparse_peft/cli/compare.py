"""``sparse-peft compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from ..adapters import Comparison
from ..adapters import compare as compare_adapters
from .folders import adapter_folder
from .output import JsonOption, answering, count_text, progress, short_names, show_table, table, value_text


def compare(
    a: Annotated[Path, typer.Argument(help="An adapter's folder.", metavar="A")],
    b: Annotated[Path, typer.Argument(help="Another's.", metavar="B")],
    as_json: JsonOption = False,
) -> None:
    """What two adapters have in common: positions, directions, sizes; and where they differ."""
    with answering("compare", as_json) as answer:
        found = compare_adapters(adapter_folder(a), adapter_folder(b), lambda layers: progress(layers, "layers"))
        answer.content = found.to_dict()
        answer.show = lambda console: show(console, found)


def show(console: Console, found: Comparison) -> None:
    """A comparison for people; the layers that differ most come first."""
    for label, folder, kind in zip("AB", (found.a, found.b), found.types, strict=True):
        console.print(f"[bold]{label}[/] {escape(folder)}: {kind}", soft_wrap=True)
    for name, (ours, theirs) in found.settings.items():
        console.print(f"  {name}: {escape(value_text(ours))} | {escape(value_text(theirs))}", soft_wrap=True)
    console.print()
    names = dict(zip([x.layer for x in found.layers], short_names([x.layer for x in found.layers]), strict=True))
    rows = [
        [
            names[layer.layer],
            _count(layer.entries_a),
            _count(layer.entries_b),
            _number(layer.jaccard),
            _number(layer.cosine),
            f"{layer.norm_a:.3g}",
            f"{layer.norm_b:.3g}",
            "identical" if layer.identical else f"{layer.difference:.3g}",
        ]
        for layer in sorted(found.layers, key=lambda layer: -layer.difference)
    ]
    if rows:
        columns = ["layer", "entries A", "B", "jaccard", "cosine", "norm A", "B", "|A - B|"]
        show_table(console, table(columns, rows, gap=1))
    for label, only in (("A", found.only_a), ("B", found.only_b)):
        if only:
            more = f" and {len(only) - 4} more" if len(only) > 4 else ""
            console.print(f"only in {label}: {escape(', '.join(only[:4]))}{more}")
    console.print()
    if found.identical:
        console.print("[bold]identical[/]: the same layers, positions and values")
        return
    console.print(
        f"[bold]all layers[/]: jaccard {_number(found.jaccard) or '-'}, cosine {_number(found.cosine) or '-'}, norms "
        f"{found.norm_a:.4g} and {found.norm_b:.4g}, |A - B| {found.difference:.4g}"
    )


def _count(entries: int | None) -> str:
    return "-" if entries is None else count_text(entries)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
