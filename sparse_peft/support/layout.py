"""Structure that a support happens to have, whatever chose it: empty rows and columns, and rows that go together.

A support of whole rows, columns or blocks has a weight gradient that is a few dense products. What counts is where the
entries lie, not which criterion put them there, so the structure is looked for in the positions themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .support import Support

# Share of the weight that the non-empty rows and columns may span for leaving the others out to pay.
COMPACT_MAX_SHARE = 0.5
# Rows with the same columns, on average over the groups, from which on dense products beat products per entry.
MIN_GROUP_HEIGHT = 8
# Gathering a group's columns, and a product of few rows, cost about as much as so many rows more: measured on one and
# two CPU threads with blocks of 16, 32 and 64 rows at 1 to 50 % of weights 1,024 to 4,096 wide.
GATHER_COST = 36


@dataclass(frozen=True)
class RowGroup:
    """Consecutive rows that train the same columns.

    Their entries are consecutive as well, and together the matrix ``(rows, columns)`` in row-major order.

    Attributes:
        start, stop: the rows.
        first, last: the entries.
        cols: ``(columns,)`` int64 columns; None for all.
    """

    start: int
    stop: int
    first: int
    last: int
    cols: Tensor | None


class Layout:
    """What the positions of one support look like; computed at first use, and kept with it.

    Args:
        support: the support, of whatever structure.

    Attributes:
        rows, cols: ``(kept,)`` int64 rows and columns that hold entries, where leaving the others out pays; else None.
        inner: the support within those rows and columns, its entries in the same order; the support itself if all
            are kept.
    """

    def __init__(self, support: Support):
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
        self.inner = Support(shape, row * shape[1] + col, validate=False, name=support.name)

    @cached_property
    def groups(self) -> tuple[RowGroup, ...]:
        """The inner support as row groups, if its rows go together; else nothing."""
        inner = self.inner
        counts = inner.row_ptr.diff()
        if inner.nnz == 0 or int((counts > 0).sum()) < MIN_GROUP_HEIGHT:
            return ()
        # a row belongs to the group of the row above if it has as many entries, in the same columns
        same = torch.zeros_like(counts, dtype=torch.bool)
        same[1:] = counts[1:] == counts[:-1]
        per_entry = counts[inner.rows.long()]
        above = (torch.arange(inner.nnz, device=inner.device) - per_entry).clamp_(min=0)
        differs = (inner.cols != inner.cols[above]) & same[inner.rows.long()]
        same[inner.rows[differs].long()] = False
        starts = (~same).nonzero().squeeze(1)
        filled = int((counts[starts] > 0).sum())
        if filled * MIN_GROUP_HEIGHT > int((counts > 0).sum()):
            return ()
        bounds = [*starts.tolist(), inner.shape[0]]
        offsets = inner.row_ptr[torch.tensor(bounds, device=inner.device)].tolist()
        return tuple(
            RowGroup(start, stop, first, last, self._columns(first, (last - first) // (stop - start)))
            for start, stop, first, last in zip(bounds[:-1], bounds[1:], offsets[:-1], offsets[1:], strict=True)
            if first < last
        )

    @cached_property
    def tile_cost(self) -> float:
        """What the groups' dense products cost, of that of the dense gradient within the kept rows and columns."""
        rows, cols = self.inner.shape
        cost = sum((g.last - g.first) * (1 + GATHER_COST / (g.stop - g.start)) for g in self.groups)
        return cost / (rows * cols)

    def work(
        self, build: Callable[[tuple[RowGroup, ...], torch.device], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """What a kernel makes of the groups to run on them; made once."""
        if self._work is None:
            self._work = build(self.groups, self.inner.device)
        return self._work

    def _columns(self, first: int, count: int) -> Tensor | None:
        return None if count == self.inner.shape[1] else self.inner.cols[first : first + count].long()


def layout_of(support: Support) -> Layout:
    """The support's [`Layout`][sparse_peft.support.Layout], computed once."""
    layout = support.__dict__.get("_layout")
    if layout is None:
        layout = support.__dict__["_layout"] = Layout(support)
    return layout
