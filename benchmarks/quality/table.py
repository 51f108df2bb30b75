"""What runs say: mean and spread over seeds at each method's best rate, and each method's worst task."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import mean, stdev
from typing import Any, NamedTuple

from .methods import AROUND, DEFAULT, LORA, METHODS
from .records import Run
from .sweep import TUNING_SEED

LORA_RATE = 2e-4
"""The rate of a LoRA script that nobody tuned."""


@dataclass(frozen=True)
class Stat:
    """Mean and sample standard deviation over seeds; the latter is None for a single one."""

    mean: float
    spread: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Stat:
        return cls(mean(values), stdev(values) if len(values) > 1 else None)

    def text(self, digits: int = 3, sign: str = "") -> str:
        spread = "" if self.spread is None else f" ± {self.spread:.{digits}f}"
        return f"{self.mean:{sign}.{digits}f}{spread}"


class Comparison(NamedTuple):
    """Runs that may be compared: of one task, one budget, and equal sizes."""

    task: str
    judged_by: str
    budget: str
    steps: int
    batch: int
    length: int
    pool: int
    held_out: int

    @classmethod
    def of(cls, run: Run) -> Comparison:
        return cls(*(getattr(run, name) for name in cls._fields))

    @property
    def title(self) -> str:
        return f"{self.task}, {self.budget}, {self.steps} steps of {self.batch} rows out of {self.pool:,}"


@dataclass(frozen=True)
class Trial:
    """A run of the tuning seed."""

    rate: float
    validation_loss: float
    gained: float
    forgotten: float | None


@dataclass(frozen=True)
class Row:
    """One method in a comparison.

    Attributes:
        rate: the one with the lowest validation loss at the tuning seed.
        tried: all rates of the tuning seed, ascending.
        share_of_lora: its mean gain ÷ LoRA's; None where LoRA did not run or did not gain.
    """

    method: str
    rate: float
    tried: tuple[Trial, ...]
    seeds: tuple[int, ...]
    trained: int
    gained: Stat
    forgotten: Stat | None
    seconds: float
    share_of_lora: float | None = None


@dataclass(frozen=True)
class Overall:
    """One method over tasks, by its gain ÷ LoRA's."""

    method: str
    mean_share: float
    worst_share: float
    worst_task: str


def comparisons(runs: Iterable[Run]) -> dict[Comparison, list[Run]]:
    found: dict[Comparison, list[Run]] = {}
    for run in runs:
        found.setdefault(Comparison.of(run), []).append(run)
    return dict(sorted(found.items()))


def rows(runs: Sequence[Run]) -> list[Row]:
    """Adapters of one comparison at their best rates, in the order of ``METHODS``; none with an automatic scale."""
    return _rows([run for run in runs if not (METHODS[run.method].automatic or _has_procedure(run.method))])


def around(runs: Sequence[Run]) -> list[Row]:
    """Procedures and the adapters that they act around, at their best rates; none where no procedure ran."""
    adapters = {run.method.partition(AROUND)[0] for run in runs if _has_procedure(run.method)}
    return _rows([run for run in runs if run.method in adapters or _has_procedure(run.method)])


def _has_procedure(method: str) -> bool:
    return AROUND in method


def swapped(runs: Sequence[Run]) -> list[Row]:
    """LoRA's script with only the config swapped: rows at LoRA's rate; none where LoRA or the default lacks."""
    at_rate = [run for run in runs if run.rate == LORA_RATE]
    found = _rows([run for run in at_rate if run.method == LORA or METHODS[run.method].automatic])
    return found if {LORA, DEFAULT} <= {row.method for row in found} else []


def _rows(runs: Sequence[Run]) -> list[Row]:
    found = []
    for method in METHODS:
        mine = [run for run in runs if run.method == method]
        tuning = [run for run in mine if run.seed == TUNING_SEED]
        if tuning:
            best = min(tuning, key=lambda run: _or_infinite(run.end["validation_loss"])).rate
            found.append(_row(method, best, tuning, [run for run in mine if run.rate == best]))
    return _with_shares(found)


def _or_infinite(loss: float) -> float:
    return math.inf if math.isnan(loss) else loss


def _row(method: str, rate: float, tuning: Sequence[Run], runs: Sequence[Run]) -> Row:
    forgotten = [run.forgotten for run in runs if run.forgotten is not None]
    return Row(
        method=method,
        rate=rate,
        tried=tuple(
            Trial(run.rate, run.end["validation_loss"], run.gained, run.forgotten)
            for run in sorted(tuning, key=lambda run: run.rate)
        ),
        seeds=tuple(sorted(run.seed for run in runs)),
        trained=runs[0].trained,
        gained=Stat.of([run.gained for run in runs]),
        forgotten=Stat.of(forgotten) if forgotten else None,
        seconds=mean(run.seconds for run in runs),
    )


def _with_shares(found: Sequence[Row]) -> list[Row]:
    lora = next((row.gained.mean for row in found if row.method == LORA), None)
    if lora is None or lora <= 0:
        return list(found)
    return [Row(**{**vars(row), "share_of_lora": row.gained.mean / lora}) for row in found]


def overall(tables: dict[Comparison, list[Row]]) -> list[Overall]:
    """Each method that ran in all comparisons with LoRA, best worst task first."""
    compared = {key: rows for key, rows in tables.items() if any(row.share_of_lora is not None for row in rows)}
    found = []
    for method in METHODS:
        shares = {
            key.task: row.share_of_lora
            for key, rows in compared.items()
            for row in rows
            if row.method == method and row.share_of_lora is not None
        }
        if len(shares) == len(compared) > 0:
            worst = min(shares, key=lambda task: shares[task])
            found.append(Overall(method, mean(shares.values()), shares[worst], worst))
    return sorted(found, key=lambda row: -row.worst_share)


def markdown(key: Comparison, found: Sequence[Row]) -> str:
    """A table of one comparison, largest gain first."""
    unit = "loss gained" if key.judged_by == "loss" else "accuracy gained"
    lines = [
        f"| {key.title} | rate (tried) | {unit} | ÷ LoRA's | loss risen elsewhere | trained | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(found, key=lambda row: -row.gained.mean):
        share = "-" if row.share_of_lora is None else f"{row.share_of_lora:.2f}"
        forgotten = "-" if row.forgotten is None else row.forgotten.text(sign="+")
        lines.append(
            f"| {row.method} | {row.rate:g} ({len(row.tried)}) | {row.gained.text()} | {share} | {forgotten} "
            f"| {row.trained:,} | {len(row.seeds)} |"
        )
    return "\n".join(lines)


def overall_markdown(found: Sequence[Overall]) -> str:
    lines = ["| over tasks | mean gain ÷ LoRA's | worst | its task |", "|---|---|---|---|"]
    lines += [f"| {row.method} | {row.mean_share:.2f} | {row.worst_share:.2f} | {row.worst_task} |" for row in found]
    return "\n".join(lines)


def text(runs: Sequence[Run]) -> str:
    """All tables as Markdown."""
    best, as_swapped = _tables(runs, rows), _tables(runs, swapped)
    parts = _part("# Each method at its best rate", best)
    if as_swapped:
        parts += _part(f"# LoRA's script at {LORA_RATE:g} with only the config swapped", as_swapped)
    if procedures := _tables(runs, around):
        parts += ["# Procedures at their best rates", *_shown(procedures)]
    return "\n\n".join(parts) + "\n"


def _part(heading: str, tables: dict[Comparison, list[Row]]) -> list[str]:
    return [heading, overall_markdown(overall(standard(tables))), *_shown(tables)]


def _shown(tables: dict[Comparison, list[Row]]) -> list[str]:
    return [markdown(key, found) for key, found in tables.items()]


def _tables(runs: Sequence[Run], made: Callable[[Sequence[Run]], list[Row]]) -> dict[Comparison, list[Row]]:
    """The tables of these runs that have a row."""
    return {key: found for key, group in comparisons(runs).items() if (found := made(group))}


def content(runs: Sequence[Run]) -> dict[str, Any]:
    """Everything as plain data, for a JSON file."""
    environments = {str(run.environment): run.environment for run in runs}
    best, as_swapped = _tables(runs, rows), _tables(runs, swapped)
    return {
        "format": 1,
        "environments": list(environments.values()),
        "comparisons": _plain(best),
        "overall": [asdict(row) for row in overall(standard(best))],
        "swapped": _plain(as_swapped),
        "swapped_overall": [asdict(row) for row in overall(standard(as_swapped))],
        "procedures": _plain(_tables(runs, around)),
    }


def _plain(tables: dict[Comparison, list[Row]]) -> list[dict[str, Any]]:
    return [{**key._asdict(), "rows": [asdict(row) for row in found]} for key, found in tables.items()]


def standard(tables: dict[Comparison, list[Row]]) -> dict[Comparison, list[Row]]:
    """Of each task the comparison with most methods: those that ``overall`` goes by."""
    found: dict[str, Comparison] = {}
    for key in sorted(tables, key=lambda key: len(tables[key])):
        found[key.task] = key
    return {key: tables[key] for key in found.values()}
