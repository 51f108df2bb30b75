"""Exceptions at chosen lines of the package, as a signal's handler raises them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import sparse_peft

PACKAGE = Path(sparse_peft.__file__).parent
# All that an interruption of a weight's transition may meet.
FOLLOWED = str(PACKAGE / "tuners"), str(PACKAGE / "ops" / "held_entries.py")

Line = tuple[str, int]


class Interrupt(KeyboardInterrupt):
    """Raised in place of a signal's."""


def lines_of(act: Callable[[], Any]) -> list[Line]:
    """The lines of ``FOLLOWED`` that an action runs, in order."""
    lines: list[Line] = []
    _traced(act, lambda frame: lines.append((frame.f_code.co_filename, frame.f_lineno)))
    return lines


def first_of_each(lines: list[Line], files: Sequence[str] = ()) -> list[int]:
    """Numbers of steps, counted from 0, at which each line is run for the first time; only of some files, if named."""
    first = {line: number for number, line in reversed(list(enumerate(lines)))}
    return sorted(number for (file, _), number in first.items() if not files or Path(file).stem in files)


def interrupted(act: Callable[[], Any], number: int) -> None:
    """Run an action, and raise in place of its line of this number."""
    seen = -1

    def count(_: FrameType) -> None:
        nonlocal seen
        seen += 1
        if seen == number:
            raise Interrupt

    with suppress(Interrupt):
        _traced(act, count)


def _traced(act: Callable[[], Any], at_line: Callable[[FrameType], None]) -> None:
    def local(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            at_line(frame)
        return local

    def trace(frame: FrameType, _event: str, _: Any) -> Any:
        return local if frame.f_code.co_filename.startswith(FOLLOWED) else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        act()
    finally:
        sys.settrace(before)
