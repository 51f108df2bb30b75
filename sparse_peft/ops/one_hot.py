"""Gradients of a weight whose rows are looked up by ids, formed from the rows that occur.

An embedding multiplies a matrix with a single 1 in each row by its weight. ``OneHot`` stands for that matrix as a
factor of the weight's gradient. What takes the factors of a linear layer takes these as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..numerics.panels import panels
from ..numerics.tokens import accumulation_dtype
from ..support import Support


@dataclass(frozen=True, eq=False)
class OneHot:
    """The matrix ``(tokens, rows)`` whose row ``t`` has a 1 in column ``ids[t]``.

    Attributes:
        ids: ``(tokens,)`` int64; -1 for a row of zeros.
        rows: number of columns: the rows of the weight.
    """

    ids: Tensor
    rows: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.ids.numel(), self.rows

    @property
    def device(self) -> torch.device:
        return self.ids.device


Factor = Tensor | OneHot  # of a weight's gradient


def entries_of_rows(support: Support, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The entries in rows of a sparse matrix.

    Args:
        support: of the matrix.
        rows: ``(n,)`` int64, in any order; rows may repeat.

    Returns:
        ``(found,)`` int64 numbers of entries, and for each its place in ``rows``.
    """
    first, last = support.ranges_of_rows(rows)
    lengths = last - first
    place = torch.arange(rows.numel(), device=rows.device).repeat_interleave(lengths)
    begins = lengths.cumsum(0) - lengths
    return torch.arange(place.numel(), device=rows.device) + (first - begins).index_select(0, place), place


def _row_sums(left: OneHot, right: Tensor, tokens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """``(ids, sums)`` of the rows of ``right`` with the same id, ascending ids, for one tile of tokens at a time."""
    dtype = accumulation_dtype(right.dtype)
    for start, stop in panels(tokens.numel(), 2 * right.shape[1] * dtype.itemsize):
        chosen = tokens[start:stop]
        found, place = left.ids.index_select(0, chosen).unique(return_inverse=True)
        rows = right.index_select(0, chosen).to(dtype)
        # torch's own sum for embeddings, in the order of the tokens on GPUs as well
        yield found, torch.ops.aten.embedding_dense_backward(rows, place, found.numel(), -1, False)


def panel_of_rows(left: OneHot, right: Tensor, start: int, stop: int) -> Tensor:
    """The rows ``start`` to ``stop`` of ``left.T @ right``, in at least float32."""
    panel = right.new_zeros(stop - start, right.shape[1], dtype=accumulation_dtype(right.dtype))
    inside = ((left.ids >= start) & (left.ids < stop)).nonzero().squeeze(1)
    for found, sums in _row_sums(left, right, inside):
        panel.index_add_(0, found - start, sums)
    return panel


def row_grad(left: OneHot, right: Tensor, support: Support) -> Tensor:
    """``left.T @ right`` at the entries of a support: ``(entries,)`` in at least float32."""
    cols = right.shape[1]
    values = right.new_zeros(support.nnz, dtype=accumulation_dtype(right.dtype))
    first, last = support.ranges_of_rows(left.ids.clamp(min=0))
    trains = (left.ids >= 0) & (last > first)
    for found, sums in _row_sums(left, right, trains.nonzero().squeeze(1)):
        entries, place = entries_of_rows(support, found)
        at = place * cols + support.cols_of(entries)
        values.index_add_(0, entries, sums.view(-1).index_select(0, at))
    return values


@dataclass(frozen=True, eq=False)
class FoundRows:
    """The rows of a weight that occur among the ids, one above the other as a smaller weight.

    Attributes:
        left: the one-hot matrix of the smaller weight.
        support: of the smaller weight.
        rows: ``(found,)`` its rows in the whole weight.
        entries: ``(entries,)`` its entries among those of the whole support.
    """

    left: OneHot
    support: Support
    rows: Tensor
    entries: Tensor

    @classmethod
    def of(cls, left: OneHot, support: Support) -> FoundRows:
        rows, place = left.ids.unique(return_inverse=True)
        if rows.numel() and int(rows[0]) < 0:  # rows of zeros
            rows, place = rows[1:], place - 1
        entries, at = entries_of_rows(support, rows)
        shape = rows.numel(), support.shape[1]
        inner = Support(shape, at * shape[1] + support.cols_of(entries), validate=False)
        return cls(OneHot(place, rows.numel()), inner, rows, entries)

    def positions_in_whole(self, positions: Tensor) -> Tensor:
        """Flat positions of the smaller weight as those of the whole one."""
        cols = self.support.shape[1]
        row = torch.div(positions, cols, rounding_mode="floor")
        return self.rows.index_select(0, row) * cols + positions - row * cols
