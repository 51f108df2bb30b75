"""DSnoT: repairing a mask without training (Dynamic Sparse no Training, https://arxiv.org/abs/2310.08915)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..constraints import Count, PositiveOrZero, validate_fields
from ..numerics.panels import panels
from .patterns import NM, Pattern, Unstructured

_LEAST_VARIANCE = 1e-8
# Few rows fit a CPU's cache, and all of them are done sooner.
_CPU_ROWS = 64


@dataclass(frozen=True)
class DSnoT:
    """Weights of a row are exchanged until pruning no longer shifts the mean of its output (section 3).

    Pruning shifts an output's mean by ``e``, the sum of ``weight * mean input`` over its pruned weights. An exchange
    restores the pruned weight with the largest contribution to ``e``, divided by the variance of its input, and prunes
    the weight of lowest Wanda score that has the other sign; with N:M patterns, that of lowest score in the group. A
    weight is exchanged, or tried, once. No weight changes its value, and no row its count.

    Args:
        max_cycles: most exchanges of a row, refused ones counted.
        threshold: of ``abs(e)``, at which a row is done.
        power: of the variance.
        strict: refuse exchanges that would not lower ``abs(e)``, and go on with the next weight to restore. Without
            it exchanges may raise it, as in the paper.
        relative: the threshold is a share of the standard deviation of the row's output, inputs taken as
            uncorrelated.
    """

    max_cycles: Count = 50
    threshold: PositiveOrZero = 0.1
    power: PositiveOrZero = 1.0
    strict: bool = True
    relative: bool = False
    name: ClassVar[str] = "dsnot"

    def __post_init__(self) -> None:
        validate_fields(self)

    def check(self, pattern: Pattern) -> None:
        """Refuse patterns whose counts exchanges within a row would change.

        Raises:
            ValueError: names the patterns that fit.
        """
        if not isinstance(pattern, (Unstructured, NM)) or getattr(pattern, "scope", None) == "column":
            raise ValueError(
                f"refine='dsnot' exchanges single weights of a row, which {pattern} does not allow; use n:m, or an "
                "unstructured pattern with scope 'row' or 'matrix'"
            )

    @torch.no_grad()
    def refine(self, weight: Tensor, kept: Tensor, mean: Tensor, square: Tensor, pattern: Pattern) -> Tensor:
        """Repair the mask of one weight.

        Args:
            weight: ``(outputs, inputs)`` floats, before pruning.
            kept: ``(outputs, inputs)`` bool.
            mean: ``(inputs,)`` mean of each input.
            square: ``(inputs,)`` mean square of each input.
            pattern: of ``kept``.

        Returns:
            ``(outputs, inputs)`` bool.
        """
        variance = (square - mean.square()).clamp_(min=_LEAST_VARIANCE)
        group = pattern.m if isinstance(pattern, NM) else None
        refined = kept.clone()
        # some six temporaries of a panel
        row_bytes, few = (
            weight.shape[1] * 6 * torch.float64.itemsize,
            _CPU_ROWS if weight.device.type == "cpu" else None,
        )
        for start, stop in panels(weight.shape[0], row_bytes, few):
            rows = _Rows(weight[start:stop], refined[start:stop], mean, square, variance.pow(self.power), group)
            floor = torch.full_like(rows.error, self.threshold)
            if self.relative:
                floor *= (weight[start:stop].double().square() @ variance.double()).sqrt()
            rows.run(self.max_cycles, floor, self.strict)
        return refined


class _Rows:
    """Rows of a weight whose mask is being repaired.

    Args:
        weight: ``(rows, inputs)``.
        kept: ``(rows, inputs)`` bool, changed in place.
        mean: ``(inputs,)``.
        square: ``(inputs,)``.
        divisor: ``(inputs,)`` by which contributions are divided in choosing the weight to restore.
        group: size of N:M groups; None without.

    Attributes:
        error: ``(rows,)`` float64: shift of the outputs' means by the pruned weights.
    """

    def __init__(
        self, weight: Tensor, kept: Tensor, mean: Tensor, square: Tensor, divisor: Tensor, group: int | None
    ) -> None:
        self.kept, self.group = kept, group
        self.part = weight.double() * mean.double()  # of each weight in the mean of its output
        self.benefit = self.part / divisor
        self.score = weight.double().abs() * square.double().sqrt()
        self.error = (self.part * ~kept).sum(1)
        self.fresh = torch.ones_like(kept)

    def run(self, cycles: int, floor: Tensor, strict: bool) -> None:
        active = self.error.abs() > floor
        for _ in range(cycles):
            if not bool(active.any()):
                return
            active = self._exchange(active, strict) & (self.error.abs() > floor)

    def _exchange(self, active: Tensor, strict: bool) -> Tensor:
        """Try one exchange in each active row; returns the rows that had candidates for one."""
        sign = self.error.sign()[:, None]
        restorable = ~self.kept & self.fresh & (self.part * sign > 0)
        best = (self.benefit * sign).masked_fill_(~restorable, -torch.inf).max(1)
        restored = best.indices[:, None]
        prunable = self.kept & self.fresh
        if self.group is None:
            prunable &= self.part * sign < 0
        else:
            places = torch.arange(self.kept.shape[1], device=self.kept.device)
            prunable &= places // self.group == restored // self.group
        worst = self.score.masked_fill(~prunable, torch.inf).min(1)
        pruned = worst.indices[:, None]
        change = (self.part.gather(1, pruned) - self.part.gather(1, restored)).squeeze(1)
        tried = active & best.values.isfinite()
        does = tried & worst.values.isfinite()
        if strict:
            does &= (self.error + change).abs() < self.error.abs()
        self._swap(does.nonzero().squeeze(1), restored, pruned)
        self.fresh[tried] = self.fresh[tried].scatter_(1, restored[tried], False)
        self.error += torch.where(does, change, 0.0)
        return tried

    def _swap(self, rows: Tensor, restored: Tensor, pruned: Tensor) -> None:
        for places, stays in ((restored, True), (pruned, False)):
            self.kept[rows, places[rows, 0]] = stays
            self.fresh[rows, places[rows, 0]] = False
