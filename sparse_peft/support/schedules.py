"""Schedules of support changes during training: pure functions of the number of optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

DECAYS: dict[str, Callable[[float], float]] = {
    "constant": lambda x: 1.0,
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "cubic": lambda x: (1 - x) ** 3,
}
"""Decays of a rate, ``{name: function}``: its remaining share after a share of the steps from start to stop."""


ENDLESS = 2**40
"""Optimizer steps of a run whose length nobody says: a share of it is no step, and reselection goes on to its end."""


def steps_of(value: int | float, total_steps: int | None, field: str) -> int:
    """A number of optimizer steps, from a number or a share of the run.

    Args:
        value: an int is a number of steps; a float is a share of the run, rounded down.
        total_steps: length of the run, if known; ``ENDLESS`` leaves ``reselect_stop`` open.
        field: name of the field, for the message.

    Raises:
        ValueError: a share of a run of unknown length.

    Example:
        >>> from sparse_peft.support import steps_of
        >>> steps_of(0.25, 1000, "start"), steps_of(50, None, "start")
        (250, 50)
    """
    if isinstance(value, int):
        return value
    if total_steps is None or (total_steps == ENDLESS and value > 0 and field != "reselect_stop"):
        raise ValueError(
            f"{field}={value!r} is a share of the run, whose length is not known: pass total_steps=, or give {field} "
            "as a number of optimizer steps (an int)"
        )
    return math.floor(value * total_steps)


@dataclass(frozen=True)
class ReselectionSchedule:
    """The optimizer steps at which entries are replaced, the steps observed before, and the share replaced.

    Steps are counted from 1, as the number of completed optimizer steps. The first event follows step
    ``start + window`` if the window leads, otherwise ``start + every``. Further events follow every ``every`` steps.
    The ``window`` steps before an event are observed.

    Attributes:
        every: steps between events.
        window: steps observed before an event, at most ``every``.
        leads: whether the first event follows the first window.
        rate: share of the entries that an event at ``start`` replaces.
        first_rate: share of the first event; None to follow the decay.
        decay: a key of [`DECAYS`][sparse_peft.support.DECAYS].
        start: completed steps before the first window.
        stop: last step with an event.

    Example:
        >>> from sparse_peft.support import ReselectionSchedule
        >>> schedule = ReselectionSchedule(
        ...     every=10, window=2, leads=False, rate=0.3, first_rate=None, decay="linear", start=0, stop=30
        ... )
        >>> list(filter(schedule.is_event, range(1, 41)))
        [10, 20, 30]
        >>> round(schedule.rate_at(20), 3)
        0.1
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
        """The step that the first event follows."""
        return self.start + (self.window if self.leads else self.every)

    def is_event(self, step: int) -> bool:
        """Whether entries are replaced after this step."""
        return self.first_event <= step <= self.stop and (step - self.first_event) % self.every == 0

    def observes(self, step: int) -> bool:
        """Whether this step is observed for the next event."""
        until_event = (self.first_event - step) % self.every
        event = step + until_event
        return until_event < self.window and self.first_event <= event <= self.stop

    def rate_at(self, step: int) -> float:
        """Share of the entries that an event after this step may replace."""
        if self.first_rate is not None and step == self.first_event:
            return self.first_rate
        span = self.stop - self.start
        return self.rate * DECAYS[self.decay](min(1.0, (step - self.start) / span) if span > 0 else 1.0)


@dataclass(frozen=True)
class BudgetSchedule:
    """A budget that falls cubically during a run.

    Sources: Zhu and Gupta (2017), https://arxiv.org/abs/1710.01878; AdaLoRA, equation 12,
    https://arxiv.org/abs/2303.10512.

    Attributes:
        initial: the budget up to ``start``.
        target: the budget from ``stop``.
        start: completed steps before the budget falls.
        stop: completed steps until the budget reaches its target.
        every: steps between changes.

    Example:
        >>> from sparse_peft.support import BudgetSchedule
        >>> schedule = BudgetSchedule(initial=800, target=100, start=0, stop=100, every=10)
        >>> schedule.at(0), schedule.at(50), schedule.at(100)
        (800, 188, 100)
    """

    initial: int
    target: int
    start: int
    stop: int
    every: int

    def is_event(self, step: int) -> bool:
        """Whether the budget changes after this step."""
        return step == self.stop or (self.start < step < self.stop and (step - self.start) % self.every == 0)

    def at(self, step: int) -> int:
        """The budget after this step."""
        if step <= self.start:
            return self.initial
        if step >= self.stop:
            return self.target
        left = DECAYS["cubic"]((step - self.start) / (self.stop - self.start))
        return self.target + round((self.initial - self.target) * left)
