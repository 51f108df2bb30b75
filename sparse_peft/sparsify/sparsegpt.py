"""SparseGPT: pruning whose error later weights of a row compensate (https://arxiv.org/abs/2301.00774)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..calibrate.gptq import check_moment, compensated_sweep, inverse_factor
from ..constraints import Count, Positive, validate_fields
from .patterns import NM, Pattern


@dataclass(frozen=True)
class SparseGPT:
    """Columns are pruned from left to right; the columns behind them compensate the error (section 3).

    With the inputs' damped second moment ``H``, a weight's score is ``w² / [H⁻¹]_jj``, where ``H`` is that of the
    columns not yet pruned. It is computed from the compensated weights, once for each ``block`` of columns, or for
    each group of N:M patterns. Counts are exact in every block, and so are scopes.

    Args:
        damping: share of the mean diagonal added to the second moment's diagonal.
        block: columns that are chosen together.
    """

    damping: Positive = 0.01
    block: Count = 128
    name: ClassVar[str] = "sparsegpt"

    def __post_init__(self) -> None:
        validate_fields(self)

    def prune(self, weight: Tensor, moment: Tensor, pattern: Pattern, units: int, name: str) -> tuple[Tensor, Tensor]:
        """Prune one weight.

        Args:
            weight: ``(outputs, inputs)`` floats.
            moment: ``(inputs, inputs)`` second moment of the inputs; overwritten.
            pattern: of the weights that stay.
            units: number of weights that stay; decided by the pattern where that is N:M.
            name: the layer's name, for error messages.

        Returns:
            ``(weights, mask)``: ``(outputs, inputs)`` float32, zero where pruned, and bool.

        Raises:
            ValueError: a second moment that is not finite, or singular despite the damping.
        """
        rows, cols = weight.shape
        check_moment(moment, cols, name)
        dead = _fill_dead(moment)
        factor = inverse_factor(moment, self.damping, name).to(torch.float32)
        group = pattern.m if isinstance(pattern, NM) else self.block
        kept = torch.zeros(rows, cols, dtype=torch.bool, device=weight.device)
        stored = torch.zeros(rows, cols, dtype=torch.float32, device=weight.device)

        def store(column: int, ahead: Tensor) -> Tensor:
            if column % group == 0:
                stop = min(column + group, cols)
                scores = (ahead[: stop - column] / factor.diagonal()[column:stop, None]).square_().t()
                scores[:, dead[column:stop]] = 0  # these weights never matter
                count = units * stop // cols - units * column // cols
                kept[:, column:stop] = pattern.keep(scores.contiguous(), count, name=name)
            stored[:, column] = ahead[0] * kept[:, column]
            return stored[:, column]

        # the groups of a pattern do not cross the sweep's blocks
        block = self.block // group * group or group
        compensated_sweep(weight.to(torch.float32, copy=True), factor, store, block)
        return stored, kept


def _fill_dead(moment: Tensor) -> Tensor:
    """Give inputs that are always zero the mean of the others, in place; returns which they are."""
    diagonal = moment.diagonal()
    dead = diagonal == 0
    if bool(dead.all()):
        diagonal.fill_(1)
        return torch.zeros_like(dead)
    diagonal[dead] = diagonal[~dead].mean()
    return dead
