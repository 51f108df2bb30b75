"""How the examples end: a small table, and checks of what they claim."""

from __future__ import annotations

from collections.abc import Mapping

import typer
from rich.console import Console
from rich.table import Table

console = Console()


def show_table(title: str, headings: list[str], rows: list[list[str]]) -> None:
    table = Table(title=title)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def report_checks(checks: Mapping[str, bool]) -> None:
    """Print each check with its result.

    Raises:
        typer.Exit: with status 1, if one failed.
    """
    for check, passed in checks.items():
        console.print(f"[green]passed[/green]  {check}" if passed else f"[red]FAILED[/red]  {check}", highlight=False)
    if not all(checks.values()):
        raise typer.Exit(1)
