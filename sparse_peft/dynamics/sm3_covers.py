"""SM3-II's covers of a sparse matrix: one accumulator for each row and column (Anil et al. 2019, algorithm 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..support import Support


def update_covers_(row: Tensor, col: Tensor, support: Support, gradient: Tensor) -> Tensor:
    """Take a gradient into the covers.

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
