"""Results as lines of JSON: one a run, appended when it ends, so that an interrupted sweep goes on where it was."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

FORMAT = 1


class Key(NamedTuple):
    """What decides a run's result, besides machine and versions."""

    task: str
    method: str
    budget: str
    rate: float
    seed: int
    steps: int
    batch: int
    length: int
    pool: int
    held_out: int


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        start, end: ``{"validation_loss", "validation_accuracy", "test_loss", "test_accuracy"}``.
        start_elsewhere, end_elsewhere: test loss on each domain that was not trained.
        trained: parameters.
        seconds: of the process's CPU time for the whole run, its evaluation too.
        environment: versions and machine.
    """

    task: str
    method: str
    budget: str
    rate: float
    seed: int
    steps: int
    batch: int
    length: int
    pool: int
    held_out: int
    judged_by: str
    trained: int
    start: dict[str, float]
    end: dict[str, float]
    start_elsewhere: dict[str, float]
    end_elsewhere: dict[str, float]
    seconds: float
    environment: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def key(self) -> Key:
        return Key(*(getattr(self, name) for name in Key._fields))

    @property
    def gained(self) -> float:
        """Fall of the test loss, or rise of the test accuracy."""
        if self.judged_by == "loss":
            return self.start["test_loss"] - self.end["test_loss"]
        return self.end["test_accuracy"] - self.start["test_accuracy"]

    @property
    def forgotten(self) -> float | None:
        """Mean rise of the loss on domains that were not trained; None without any."""
        rises = [self.end_elsewhere[name] - loss for name, loss in self.start_elsewhere.items()]
        return sum(rises) / len(rises) if rises else None


def read_runs(paths: Iterable[Path]) -> list[Run]:
    """All runs of these files that exist; a line that an interruption cut short is left out with a warning."""
    runs: dict[Key, Run] = {}
    for path in paths:
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        for number, line in enumerate(lines, 1):
            try:
                run = Run(**json.loads(line))
            except (json.JSONDecodeError, TypeError) as error:
                warnings.warn(f"{path}, line {number}, is no run and is left out: {error}", stacklevel=2)
                continue
            runs[run.key] = run
    return list(runs.values())


def append_run(path: Path, run: Run) -> None:
    """Add a line, below what an interruption may have left of another."""
    path.parent.mkdir(parents=True, exist_ok=True)
    begun = path.is_file() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write(("\n" if begun else "") + json.dumps(asdict(run)) + "\n")
