"""``sparse-peft doctor``."""

from __future__ import annotations

from dataclasses import asdict

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..doctor import ABSENT, BROKEN, OK, Check, examine
from .output import PROBLEM, JsonOption, answering

MARKS = {OK: "[green]ok[/]", ABSENT: "[dim]-[/]", BROKEN: "[red]broken[/]"}


def doctor(as_json: JsonOption = False) -> None:
    """Whether this installation works: versions, compilers, devices, kernels, cache. Exit code 1 if not."""
    with answering("doctor", as_json) as answer:
        checks = examine()
        broken = [check for check in checks if check.status == BROKEN]
        answer.content = {"healthy": not broken, "checks": [asdict(check) for check in checks]}
        answer.show = lambda console: show(console, checks)
        if broken:
            answer.code = PROBLEM


def show(console: Console, checks: list[Check]) -> None:
    """The findings for people, group by group."""
    grid = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    group = None
    for check in checks:
        if check.group != group:
            group = check.group
            grid.add_row(f"[bold]{group}[/]")
        note = f"  [dim]{escape(check.note)}[/]" if check.note else ""
        grid.add_row(MARKS[check.status], escape(check.name), escape(check.found) + note)
    console.print(grid)
    broken = [check.name for check in checks if check.status == BROKEN]
    console.print(f"[red]broken: {', '.join(broken)}[/]" if broken else "[green]nothing is broken[/]")
