"""Recipes of sparse-aware fine-tuning: when the mask changes, what passes it, and what pulls weights to zero."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ...sparsify import NM, Unstructured
from ...support import BudgetSchedule

Steps = int | float
Opening = Literal["hard", "dense", "decaying"]
"""What passes where the mask has a zero: nothing; everything until ``stop``; a share that falls to zero."""
Pull = Literal["none", "decay", "l1", "masked l1"]
"""What is added to the gradient: the masked weights, the signs of all weights, or the signs of the masked ones."""
DECAYS = ("exp", "linear")
LADDERS = ("stepwise", "geometric")
LAST_FLOW = 100  # an exponentially decaying mask ends at 1 / 100


@dataclass(frozen=True)
class Recipe:
    """One way to get from a dense weight to a sparse one.

    Attributes:
        pattern: by default.
        trains: by default.
        start, stop: by default: completed steps, or shares of the run, between which the mask changes.
        changes: whether it does.
        shrinks: how the pattern gets there: at once, cubically, or by a ladder of n:m patterns.
        opening: what passes a zero of the mask.
        straight: whether gradients pass it whole, by default.
        pull: what pulls weights to zero until ``stop``.
        pull_weight: by default.
        learns_scores: whether low-rank scores train with the mask.
        outside: whether the delta is added behind the mask.
        back: whether another mask, along the outputs, multiplies the output's gradient.
        scales_rows: whether a factor of each output trains.
    """

    pattern: float | str = 0.5
    trains: str = "low_rank"
    start: Steps = 0
    stop: Steps = 0.9
    changes: bool = True
    shrinks: Literal["once", "cubic", "ladder"] = "once"
    opening: Opening = "hard"
    straight: bool = False
    pull: Pull = "none"
    pull_weight: float = 0.0
    learns_scores: bool = False
    outside: bool = False
    back: bool = False
    scales_rows: bool = False


RECIPES: dict[str, Recipe] = {
    "static": Recipe(changes=False),
    "gradual": Recipe(start=0.25, stop=0.75, shrinks="cubic"),
    "pst": Recipe(start=0.1, stop=0.7, shrinks="cubic", straight=True, learns_scores=True),
    "ast": Recipe(pattern="2:4", straight=True, pull="decay", pull_weight=1e-4),
    "cast": Recipe(
        pattern="2:4", trains="weights", opening="dense", pull="masked l1", pull_weight=1.0, scales_rows=True
    ),
    "mdgf": Recipe(pattern="2:4", opening="decaying"),
    "sdgf": Recipe(pattern="2:4", shrinks="ladder"),
    "bdwp": Recipe(pattern="2:8", straight=True, pull="decay", pull_weight=1e-4, back=True),
    "l1": Recipe(stop=0.5, opening="dense", pull="l1", pull_weight=1e-4),
    "dsee": Recipe(trains="low_rank+sparse", changes=False, outside=True),
}
"""``{name: recipe}``; see [`PruneConfig`][sparse_peft.PruneConfig]."""


@dataclass(frozen=True)
class Timeline:
    """A recipe in a run: what holds after each number of completed steps.

    Attributes:
        recipe: what happens.
        pattern: at the end.
        start, stop: completed steps between which the mask changes.
        every: steps between two of its changes.
        ladder: patterns before the last, for recipes with one.
        decay: one of ``DECAYS``.
        pull: weight of the pull at its height.
        ramp: completed steps until the pull is at its height.
    """

    recipe: Recipe
    pattern: NM | Unstructured
    start: int
    stop: int
    every: int
    ladder: tuple[NM, ...] = ()
    decay: str = "exp"
    pull: float = 0.0
    ramp: int = 0

    def is_event(self, step: int) -> bool:
        """Whether the mask is chosen anew after this step."""
        if not self.recipe.changes or step <= 0:
            return False
        if self.recipe.pull == "l1":  # everything stays until then
            return step == self.stop
        return step == self.stop or (self.start < step < self.stop and (step - self.start) % self.every == 0)

    def wanted(self, step: int, numel: int) -> tuple[NM | Unstructured, int | None]:
        """The pattern after this step, and the number of weights of ``numel`` that stay where it decides none."""
        if self.recipe.shrinks == "ladder":
            return self._rung(step), None
        if not isinstance(self.pattern, Unstructured):
            return self.pattern, None
        target = round(self.pattern.density * numel)
        if self.recipe.shrinks == "once":
            return self.pattern, target
        return self.pattern, BudgetSchedule(numel, target, self.start, self.stop, self.every).at(step)

    def _rung(self, step: int) -> NM:
        """The patterns of the ladder take equal shares of the time between start and stop; the last has the rest."""
        assert isinstance(self.pattern, NM)
        into = max(0, min(step, self.stop) - self.start)
        place = into * (len(self.ladder) + 1) // max(1, self.stop - self.start)
        return self.ladder[place] if place < len(self.ladder) and step < self.stop else self.pattern

    def starts_open(self) -> bool:
        """Whether all weights stay at first."""
        waits = self.recipe.shrinks == "cubic" and isinstance(self.pattern, Unstructured)
        return waits or (self.recipe.opening == "dense" and self.recipe.pull == "l1")

    def beta(self, step: int) -> float:
        """What passes a zero of the mask after this step."""
        if self.recipe.opening == "hard" or step >= self.stop:
            return 0.0
        if self.recipe.opening == "dense":
            return 1.0
        share = max(0, step - self.start) / max(1, self.stop - self.start)
        return LAST_FLOW**-share if self.decay == "exp" else 1 - share

    def is_straight(self, step: int, straight: bool) -> bool:
        """Whether gradients of this step, counted from 1, pass the mask whole: not once it is final."""
        return straight and step <= self.stop

    def pull_at(self, step: int) -> float:
        """Weight of the pull in this step, counted from 1."""
        if self.recipe.pull == "none" or step > self.stop:
            return 0.0
        return self.pull * min(1.0, step / self.ramp if self.ramp else 1.0)


def ladder_of(pattern: NM, kind: str) -> tuple[NM, ...]:
    """The n:m patterns before the last one (Progressive Gradient Flow, https://arxiv.org/abs/2402.04744, section 4).

    Args:
        pattern: the last one.
        kind: ``"stepwise"``: ``m-1:m``, then half of the weights less at each step; ``"geometric"``: ``8n:8m``,
            ``4n:4m``, ``2n:2m``, of equal density.

    Example:
        >>> from sparse_peft.sparsify import NM
        >>> from sparse_peft.tuners.prune.recipes import ladder_of
        >>> [f"{p.n}:{p.m}" for p in ladder_of(NM(1, 8), "stepwise")]
        ['7:8', '4:8', '2:8']
    """
    if kind == "geometric":
        return tuple(NM(pattern.n * factor, pattern.m * factor) for factor in (8, 4, 2))
    halves = range(1, max(1, math.ceil(math.log2(pattern.m / pattern.n))))
    kept = [pattern.m - 1, *(pattern.m >> power for power in halves)]
    return tuple(NM(n, pattern.m) for n in kept if n > pattern.n)
