"""When supports change during training, and by how much: pure functions of the number of optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

# What is left of the first rate after a share ``x`` of the time between start and stop.
DECAYS: dict[str, Callable[[float], float]] = {
    "constant": lambda x: 1.0,
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "cubic": lambda x: (1 - x) ** 3,
}
"""How a rate falls, ``{name: function}``: the share of the rate at a share of the way from start to stop."""


def steps_of(value: int | float, total_steps: int | None, field: str) -> int:
    """A number of optimizer steps: an int as it is, a float as that share of the whole run, rounded down.

    Raises:
        ValueError: a share, and the length of the run is not known.
    """
    if isinstance(value, int):
        return value
    if total_steps is None:
        raise ValueError(
            f"{field}={value!r} is a share of the run, whose length is not known: pass total_steps=, or give {field} "
            "as a number of optimizer steps (an int)"
        )
    return math.floor(value * total_steps)


@dataclass(frozen=True)
class ReselectionSchedule:
    """At which optimizer steps entries are replaced, what is observed before, and how many are replaced.

    Steps are counted from 1, as the number of completed optimizer steps. An event comes every ``every`` steps, after
    the step ``start + first`` for the first time, where ``first`` is ``window`` if the window leads and ``every``
    otherwise; the ``window`` steps before an event are observed.

    Attributes:
        every: steps from one event to the next.
        window: steps observed before an event, at most ``every``.
        leads: whether the first event comes after the first window.
        rate: share of the entries replaced by an event at ``start``.
        first_rate: share of the first event; None for what the decay says.
        decay: name of one of [`DECAYS`][sparse_peft.support.DECAYS].
        start, stop: number of completed steps before the first window, and after which there is no event.
    """

    every: int
    window: int
    leads: bool
    rate: float
    first_rate: float | None
    decay: str
    start: int
    stop: int

    @property
    def first_event(self) -> int:
        return self.start + (self.window if self.leads else self.every)

    def is_event(self, step: int) -> bool:
        """Whether entries are replaced after this step."""
        return self.first_event <= step <= self.stop and (step - self.first_event) % self.every == 0

    def observes(self, step: int) -> bool:
        """Whether this step's gradients count for the next event."""
        until_event = (self.first_event - step) % self.every
        event = step + until_event
        return until_event < self.window and self.first_event <= event <= self.stop

    def rate_at(self, step: int) -> float:
        """Share of the entries that an event after this step puts up for replacement."""
        if self.first_rate is not None and step == self.first_event:
            return self.first_rate
        span = self.stop - self.start
        return self.rate * DECAYS[self.decay](min(1.0, (step - self.start) / span) if span > 0 else 1.0)


@dataclass(frozen=True)
class BudgetSchedule:
    """A budget that falls cubically in the course of a run (Zhu and Gupta 2018; AdaLoRA, equation 12).

    Attributes:
        initial, target: at the start, and from ``stop`` on.
        start, stop: number of completed steps where it begins to fall, and where it has its target.
        every: steps from one change to the next.
    """

    initial: int
    target: int
    start: int
    stop: int
    every: int

    def is_event(self, step: int) -> bool:
        """Whether the budget is shared anew after this step."""
        return step == self.stop or (self.start < step < self.stop and (step - self.start) % self.every == 0)

    def at(self, step: int) -> int:
        """The budget after this step."""
        if step <= self.start:
            return self.initial
        if step >= self.stop:
            return self.target
        left = DECAYS["cubic"]((step - self.start) / (self.stop - self.start))
        return self.target + round((self.initial - self.target) * left)
