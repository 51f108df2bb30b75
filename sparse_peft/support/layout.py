"""The structure of a support: empty rows and columns, and groups of rows with the same columns.

The weight gradient at a support of whole rows, columns or blocks is a few dense products. The structure is found in
the positions, so it does not matter how they were chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .support import Support

# Rows and columns without entries are left out if the others span at most this share of the weight.
COMPACT_MAX_SHARE = 0.5
# Average rows per group from which dense products are faster than products per entry.
MIN_GROUP_HEIGHT = 8
# Overhead per group, to gather its columns and multiply few rows, in rows: measured on one and two CPU threads with
# blocks of 16, 32 and 64 rows at 1 to 50 % of weights 1,024 to 4,096 wide.
GATHER_COST = 36


@dataclass(frozen=True)
class RowGroup:
    """Consecutive rows that train the same columns.

    Their entries are consecutive and form the matrix ``(rows, columns)`` in row-major order.

    Attributes:
        start: first row.
        stop: last row + 1.
        first: first entry.
        last: last entry + 1.
        cols: ``(columns,)`` int64 columns; None for all.
    """

    start: int
    stop: int
    first: int
    last: int
    cols: Tensor | None


class Layout:
    """The structure of one support; see ``layout_of``.

    Args:
        support: any support.

    Attributes:
        rows: ``(kept,)`` int64 rows with entries; None if all rows are kept.
        cols: ``(kept,)`` int64 columns with entries; None if all columns are kept.
        inner: the support within the kept rows and columns, its entries in the same order.
    """

    def __init__(self, support: Support) -> None:
        self.rows: Tensor | None = None
        self.cols: Tensor | None = None
        self.inner = support
        self._work: tuple[Tensor, Tensor] | None = None
        rows, cols = support.shape
        if support.nnz == 0:
            return
        used_rows = support.row_ptr.diff().nonzero().squeeze(1)
        is_used = torch.zeros(cols, dtype=torch.bool, device=support.device)
        is_used[support.cols] = True
        used_cols = is_used.nonzero().squeeze(1)
        if used_rows.numel() * used_cols.numel() > COMPACT_MAX_SHARE * rows * cols:
            return
        self.rows = used_rows if used_rows.numel() < rows else None
        self.cols = used_cols if used_cols.numel() < cols else None
        row = torch.searchsorted(used_rows, support.rows.long())
        col = torch.searchsorted(used_cols, support.cols.long())
        shape = (used_rows.numel(), used_cols.numel())
        self.inner = Support(shape, row * shape[1] + col, validate=False, name=support.name).compact()

    @cached_property
    def groups(self) -> tuple[RowGroup, ...]:
        """The inner support as row groups; empty if the groups are too small for dense products."""
        inner = self.inner
        counts, rows, cols = inner.row_ptr.diff(), inner.rows.long(), inner.cols
        if inner.nnz == 0 or int((counts > 0).sum()) < MIN_GROUP_HEIGHT:
            return ()
        # a row belongs to the group of the row above if it has as many entries, in the same columns
        same = torch.zeros_like(counts, dtype=torch.bool)
        same[1:] = counts[1:] == counts[:-1]
        per_entry = counts[rows]
        above = (torch.arange(inner.nnz, device=inner.device) - per_entry).clamp_(min=0)
        differs = (cols != cols[above]) & same[rows]
        same[rows[differs]] = False
        starts = (~same).nonzero().squeeze(1)
        filled = int((counts[starts] > 0).sum())
        if filled * MIN_GROUP_HEIGHT > int((counts > 0).sum()):
            return ()
        bounds = [*starts.tolist(), inner.shape[0]]
        offsets = inner.row_ptr[torch.tensor(bounds, device=inner.device)].tolist()
        return tuple(
            RowGroup(start, stop, first, last, self._columns(cols, first, (last - first) // (stop - start)))
            for start, stop, first, last in zip(bounds[:-1], bounds[1:], offsets[:-1], offsets[1:], strict=True)
            if first < last
        )

    @cached_property
    def tile_cost(self) -> float:
        """Cost of the groups' dense products, relative to the dense gradient of the kept rows and columns."""
        rows, cols = self.inner.shape
        cost = sum((g.last - g.first) * (1 + GATHER_COST / (g.stop - g.start)) for g in self.groups)
        return cost / (rows * cols)

    def work(
        self, build: Callable[[tuple[RowGroup, ...], torch.device], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """A kernel's work list, built once from the groups and the device."""
        if self._work is None:
            self._work = build(self.groups, self.inner.device)
        return self._work

    def _columns(self, cols: Tensor, first: int, count: int) -> Tensor | None:
        return None if count == self.inner.shape[1] else cols[first : first + count].long()


def layout_of(support: Support) -> Layout:
    """The support's [`Layout`][sparse_peft.support.Layout], computed once."""
    if "layout" not in support.derived:
        support.derived["layout"] = Layout(support)
    return support.derived["layout"]
