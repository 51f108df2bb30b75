"""Which runs a sweep makes: for each method the rates around its best, then other seeds at the best."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .methods import METHODS, RATES, Budget
from .records import Key, Run, append_run, read_runs
from .tasks import Sizes

TUNING_SEED = 0
Train = Callable[[str, Budget, float, int], Run]


@dataclass
class Sweep:
    """Runs of one task at one budget, none of which is made twice.

    Args:
        task: its name.
        sizes: of the runs.
        budget: trained parameters.
        train: makes a run.
        path: where lines are added; runs of it are known.
        others: more files with known runs.
        tell: is told of every new run.
    """

    task: str
    sizes: Sizes
    budget: Budget
    train: Train
    path: Path
    others: Sequence[Path] = ()
    tell: Callable[[Run], None] = lambda run: None
    known: dict[Key, Run] = field(init=False)

    def __post_init__(self) -> None:
        self.known = {run.key: run for run in read_runs([*self.others, self.path])}

    def run(self, method: str, rate: float, seed: int) -> Run:
        """The run, which is made if it is not known."""
        key = Key(self.task, method, str(self.budget), rate, seed, **vars(self.sizes))
        if key not in self.known:
            run = self.train(method, self.budget, rate, seed)
            append_run(self.path, run)
            self.known[key] = run
            self.tell(run)
        return self.known[key]

    def best_rate(self, method: str) -> float:
        """The rate with the lowest loss on the validation split."""
        return downhill(RATES, METHODS[method].start, lambda rate: self._validation_loss(method, rate))

    def _validation_loss(self, method: str, rate: float) -> float:
        return self.run(method, rate, TUNING_SEED).end["validation_loss"]

    def tuned(self, methods: Iterable[str], seeds: int) -> None:
        """Each method at its best rate, with so many seeds."""
        self.at([(method, self.best_rate(method)) for method in methods], seeds)

    def at(self, rows: Sequence[tuple[str, float]], seeds: int) -> None:
        """Methods at given rates, with so many seeds each."""
        for seed in range(seeds):
            for method, rate in rows:
                self.run(method, rate, seed)


def downhill(rates: Sequence[float], start: float, loss: Callable[[float], float]) -> float:
    """The rate, walking from ``start``, that is better than both its neighbours; ``rates`` ascend.

    A neighbour that is better is walked to at once, so that runs behind it are never made.
    """
    at = rates.index(start)
    for step in (1, -1):
        came_from = at
        while 0 <= at + step < len(rates) and loss(rates[at]) > loss(rates[at + step]):
            at += step
        if at != came_from:
            break
    return rates[at]
