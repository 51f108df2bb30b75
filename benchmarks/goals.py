"""What this package promises, as data, and whether a run keeps it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .measure import Ratio
from .runner import Result, Row

STEP_DENSITIES = (0.001, 0.01)


@dataclass(frozen=True)
class Goal:
    """A bound on one field of the sparse rows.

    Args:
        name: what is promised, in words.
        field: the ``Row`` field that is bounded.
        bound: the highest value that keeps the promise; a function of the run where noise decides.
        applies: which rows the promise is for.
        in_serving: whether only runs that measure serving can tell.
    """

    name: str
    field: str
    bound: float | Callable[[Result], float]
    applies: Callable[[Result, Row], bool] = lambda result, row: True
    in_serving: bool = False


@dataclass(frozen=True)
class Verdict:
    """One goal on one row. ``value`` is None, and the goal missed, where the run could not measure it."""

    goal: str
    method: str
    bound: float
    value: float | None

    @property
    def passed(self) -> bool:
        return self.value is not None and self.value <= self.bound


def decode_bound(result: Result) -> float:
    """1, plus how far the base model is measured from itself: the median's distance and its uncertainty."""
    return 1.0 + abs(result.decode_noise.median - 1.0) + result.decode_noise.error


def _cpu_at_small_density(result: Result, row: Row) -> bool:
    lowest, highest = STEP_DENSITIES
    return result.clock == "cpu" and row.density is not None and lowest <= row.density <= highest


def _dense_at_small_density(result: Result, row: Row) -> bool:
    return _cpu_at_small_density(result, row) and "quantised" not in result.sizes


GOALS = (
    Goal("training step at 0.1-1 % on CPU / LoRA's", "step_vs_lora", 1.0, _cpu_at_small_density),
    Goal("training step at 0.1-1 % on CPU / LoRA's with dropout", "step_vs_dropout", 0.85, _dense_at_small_density),
    Goal("training step at 0.1-1 % on CPU / SHiRA's", "step_vs_shira", 0.7, _dense_at_small_density),
    Goal("peak memory of a step / the frozen model's", "peak_vs_frozen", 1.15, _dense_at_small_density),
    Goal("peak memory above frozen / LoRA's", "peak_extra_vs_lora", 0.6),
    Goal("adapter switch / LoRA's unfuse + fuse", "switch_vs_lora", 0.05, in_serving=True),
    Goal("decode step / base model's", "decode_vs_base", decode_bound, in_serving=True),
)


def judge(result: Result, goals: tuple[Goal, ...] = GOALS) -> list[Verdict]:
    """Every goal on every sparse row that it is for."""
    verdicts = []
    for goal in goals:
        if goal.in_serving and result.decode_noise is None:
            continue
        bound = goal.bound(result) if callable(goal.bound) else goal.bound
        for row in result.rows:
            if row.is_sparse and goal.applies(result, row):
                value = getattr(row, goal.field)
                value = value.median if isinstance(value, Ratio) else value
                verdicts.append(Verdict(goal.name, row.method, bound, value))
    return verdicts
