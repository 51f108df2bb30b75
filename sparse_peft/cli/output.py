"""What commands share: one answer on stdout for people or for programs, everything else on stderr, exit codes."""

from __future__ import annotations

import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Annotated, Any, Literal, NoReturn, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import track
from rich.table import Table
from rich.text import Text

from ..adapters.files import NoAdapterError

OK, PROBLEM, USAGE = 0, 1, 2
WIDTH_OF_PIPES = 160
LISTED = 8  # items of a field's value that are shown to people

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace what is there.")]

Item = TypeVar("Item")
Cell = str | Text  # of a table


class UsageError(Exception):
    """An invalid request: a path, a name or a value of an option."""


@contextmanager
def asked() -> Iterator[None]:
    """Errors inside come from what was asked for, not from what was found."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        raise UsageError(str(error)) from error


def refuse(command: str, error: Exception) -> NoReturn:
    """End a command whose request was invalid.

    Raises:
        typer.Exit: with 2.
    """
    with answering(command, as_json=False):
        raise UsageError(str(error)) from error
    raise AssertionError


_options: dict[str, frozenset[str]] = {}  # {command: names of its options as its function has them}


def note_options(command: Callable[..., None]) -> None:
    """Remember a command's options, so that errors of the library name them as they are written."""
    parameters = inspect.signature(command).parameters.values()
    _options[command.__name__] = frozenset(p.name for p in parameters if p.default is not p.empty)


def in_words_of(command: str, message: str) -> str:
    """A message of the library with the command's options: ``--rank 4`` for ``rank=4``."""
    names = "|".join(sorted(_options.get(command, ()), key=len, reverse=True))
    if not names:
        return message

    def option(found: re.Match[str]) -> str:
        value = (found["value"] or "").strip("'")
        return " ".join([f"--{found['name'].replace('_', '-')}", *([value] if value not in ("", "True") else [])])

    value = r"(?P<value>'[^']*'|(?!None\b)[\w+-][\w.+-]*(?<!\.)|(?=[,;:\s]|$))"
    return re.sub(rf"\b(?P<name>{names})={value}", option, message)


class Answer:
    """What a command has to say.

    Attributes:
        content: for programs; its keys stay the same from version to version.
        show: prints it for people.
        code: the exit code.
    """

    def __init__(self) -> None:
        self.content: dict[str, Any] = {}
        self.show: Callable[[Console], None] = lambda console: None
        self.code = OK


@contextmanager
def answering(command: str, as_json: bool) -> Iterator[Answer]:
    """A command's work is done inside; stdout gets the answer alone, at the end.

    Raises:
        typer.Exit: with 1 for a problem that was found, with 2 for an invalid request.
    """
    answer = Answer()
    problem: Exception | None = None
    # libraries print what they like, and programs read stdout
    with redirect_stdout(sys.stderr):
        try:
            yield answer
        except (UsageError, NoAdapterError) as error:
            answer.code, problem = USAGE, error
        except (ValueError, TypeError, RuntimeError, OSError, ImportError, NotImplementedError) as error:
            answer.code, problem = PROBLEM, error
    if problem is not None:
        message = in_words_of(command, " ".join(str(problem).split()) or type(problem).__name__)
        Console(stderr=True, soft_wrap=True, emoji=False).print(
            f"[red]sparse-peft {command}:[/] {escape(message)}", highlight=False
        )
        if as_json:
            print_error(command, message, answer.code)
    elif as_json:
        print_json({"command": command, **answer.content})
    else:
        answer.show(console_for_people())
    if answer.code != OK:
        raise typer.Exit(answer.code)


def console_for_people() -> Console:
    """stdout; where that is a pipe or a file, no line is cut to the width of a terminal that is not there."""
    console = Console(highlight=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = WIDTH_OF_PIPES
    return console


def print_error(command: str, message: str, code: int) -> None:
    """An error for programs."""
    kind = "usage" if code == USAGE else "problem"
    print_json({"command": command, "error": {"kind": kind, "message": message}})


def print_json(content: dict[str, Any]) -> None:
    """One object for programs."""
    sys.stdout.write(json.dumps(content, indent=1, allow_nan=False) + "\n")


def progress(items: Sequence[Item], what: str) -> Iterable[Item]:
    """The items, with a bar on stderr where that is a terminal."""
    console = Console(stderr=True)
    return track(items, what, console=console, transient=True, disable=not console.is_terminal)


@contextmanager
def working(what: str) -> Iterator[None]:
    """A sign of life on stderr, where that is a terminal, for work that does not come in steps."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(what):
        yield


def table(columns: Sequence[str], rows: Iterable[Sequence[Cell]], gap: int = 2, totals: Iterable[int] = ()) -> Table:
    """A plain table: words in its first column, numbers in the others.

    Args:
        columns: their headings.
        rows: a cell for each column.
        gap: spaces between columns.
        totals: rows that are printed bold, from the end where negative.
    """
    made = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0))
    for number, column in enumerate(columns):
        style = None if number else "cyan"
        justify: Literal["left", "right"] = "right" if number else "left"
        made.add_column(column, justify=justify, no_wrap=True, header_style="dim", style=style)
    lines = list(rows)
    bold = {number % len(lines) for number in totals if lines}
    for number, row in enumerate(lines):
        cells = (cell if isinstance(cell, Text) else escape(cell) for cell in row)
        made.add_row(*cells, style="bold" if number in bold else None)
    return made


def show_table(console: Console, made: Table, title: str | None = None) -> None:
    """Print a table: in a panel like those of ``--help`` on a terminal, with nothing around it elsewhere."""
    if console.is_terminal:
        console.print(Panel(made, title=title, title_align="left", border_style="dim", expand=False))
        return
    if title is not None:
        console.print(f"[bold]{escape(title)}[/]")
    console.print(made)


def value_text(value: Any) -> str:
    """A config field's value, as ``--set`` takes it; long lists are cut."""
    if isinstance(value, (list, tuple)):
        more = f",... ({len(value)})" if len(value) > LISTED else ""
        return ",".join(map(str, value[:LISTED] if not more else value[:2])) + more
    return "none" if value is None else str(value)


def fields_text(fields: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value_text(value)}" for name, value in fields.items()) or "defaults"


def short_names(names: Sequence[str]) -> list[str]:
    """The names without the words that all of them begin with, one word being left."""
    parts = [name.split(".") for name in names]
    same = 0
    while parts and all(len(p) > same + 1 and p[same] == parts[0][same] for p in parts):
        same += 1
    return [".".join(p[same:]) for p in parts]


def bytes_text(count: float | None) -> str:
    """``1.5 GiB``."""
    if count is None:
        return "?"
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:,.0f} GiB" if count >= 100 else f"{count:.3g} GiB"


def count_text(count: float | None) -> str:
    """``65.2 M``; exact below a million."""
    if count is None:
        return "?"
    if count < 1e6:
        return f"{count:,.0f}"
    count /= 1e6
    for unit in ("M", "G", "T"):
        if count < 1000 or unit == "T":
            break
        count /= 1000
    return f"{count:,.0f} {unit}" if count >= 100 else f"{count:.3g} {unit}"


def share_text(share: float) -> str:
    """``0.96 %``."""
    return f"{100 * share:.3g} %"


def seconds_text(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 120 else f"{seconds / 60:.3g} min"
