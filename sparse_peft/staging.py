"""Files that are replaced whole: each once it is complete, or several together."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from pathlib import Path


class _Waiting:
    """Staging folders whose files are complete, the folders that they belong to, and what follows."""

    def __init__(self, stack: ExitStack) -> None:
        self.stack = stack
        self.moves: list[tuple[Path, Path]] = []
        self.actions: list[Callable[[], None]] = []


_waiting: ContextVar[_Waiting | None] = ContextVar("waiting", default=None)


@contextmanager
def staging_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """A folder to write into, whose files move to ``folder`` once all of them are complete.

    Within ``replaced_together`` they wait for the others. After an exception nothing is left of them.

    Args:
        folder: made if need be; its files of the same names are replaced.
    """
    target, waiting = Path(folder), _waiting.get()
    target.mkdir(parents=True, exist_ok=True)
    with ExitStack() as own:
        stack = own if waiting is None else waiting.stack
        staging = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=target, prefix=".saving-")))
        yield staging
        if waiting is None:
            _move(staging, target)
        else:
            waiting.moves.append((staging, target))


def _move(staging: Path, target: Path) -> None:
    for path in sorted(staging.iterdir()):
        path.replace(target / path.name)


@contextmanager
def replaced_together() -> Iterator[None]:
    """Files of the staging folders inside take their places at the end, all of them or none."""
    with ExitStack() as stack:
        waiting = _Waiting(stack)
        token = _waiting.set(waiting)
        try:
            yield
        finally:
            _waiting.reset(token)
        for staging, target in waiting.moves:
            _move(staging, target)
    for action in waiting.actions:
        action()


def when_saved(action: Callable[[], None]) -> None:
    """Run an action once all files are in their places: now, or at the end of ``replaced_together``."""
    waiting = _waiting.get()
    if waiting is None:
        action()
    else:
        waiting.actions.append(action)


def is_waiting(path: str | os.PathLike) -> bool:
    """Whether a file is complete and will take this place."""
    waiting, wanted = _waiting.get(), Path(path)
    moves = [] if waiting is None else waiting.moves
    return any(target == wanted.parent and (staging / wanted.name).exists() for staging, target in moves)
