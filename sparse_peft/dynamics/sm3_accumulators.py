"""SM3-II's accumulators of a sparse matrix, one for each row and column (Anil et al. 2019, algorithm 2)."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ..support import Support


@runtime_checkable
class KeepsAccumulators(Protocol):
    """An optimizer that keeps such accumulators in its own state."""

    def row_and_column_accumulators(self, parameter: Tensor) -> tuple[Tensor, Tensor] | None:
        """``(rows,)`` and ``(cols,)`` float32; None before the parameter's first step."""


def accumulate_(row: Tensor, col: Tensor, support: Support, gradient: Tensor) -> Tensor:
    """Add a gradient to the accumulators.

    Entries that are not finite count as 0.

    Args:
        row, col: ``(rows,)`` and ``(cols,)`` float32, changed in place.
        support: positions of the entries.
        gradient: ``(entries,)``.

    Returns:
        ``(entries,)`` float32: the accumulator of each entry, ``min(row, col) + gradient ** 2``.
    """
    rows, cols = support.rows.long(), support.cols.long()
    squared = gradient.detach().to(torch.float32).nan_to_num(0.0, 0.0, 0.0).square()
    entries = torch.minimum(row[rows], col[cols]) + squared
    row.scatter_reduce_(0, rows, entries, "amax")
    col.scatter_reduce_(0, cols, entries, "amax")
    return entries
