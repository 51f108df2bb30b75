"""The largest entries of the outer product of two vectors, without the whole product."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator

import torch
from torch import Tensor

from ..numerics.errors import layer_prefix
from ..numerics.panels import panel_bytes
from ..numerics.topk import topk_indices
from .support import Support

# Number of surplus products that are cheaper to sort than to exclude by a finer threshold.
SLACK = 4096
# Memory to enumerate one product: its row, rank, position and value.
ENUMERATED_BYTES = 64


def _bits(number: float) -> int:
    """A positive float64 as an integer with the same order."""
    return struct.unpack("<q", struct.pack("<d", number))[0]


def _number(bits: int) -> float:
    return struct.unpack("<d", struct.pack("<q", bits))[0]


class _Products:
    """Products ``rows[i] * cols[j]`` in float64, in which products of float32 numbers are exact."""

    def __init__(self, rows: Tensor, cols: Tensor):
        self.rows = rows.double()
        self.cols, self.place = cols.double().sort(descending=True)
        self.distinct, counts = torch.unique_consecutive(self.cols, return_counts=True)
        self.until = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
        self._ascending = self.distinct.neg()

    @property
    def largest(self) -> float:
        return float(self.rows.amax() * self.cols[0])

    def reach(self, threshold: float) -> Tensor:
        """``(rows,)`` number of products in each row, the first in ``place``, that reach a positive threshold."""
        number = torch.searchsorted(self._ascending, (threshold / self.rows).neg(), right=True)
        # the division rounds; the products of the distinct numbers on both sides of the bound do not
        following = self.distinct[number.clamp(max=self.distinct.numel() - 1)] * self.rows
        preceding = self.distinct[(number - 1).clamp(min=0)] * self.rows
        number = number + ((number < self.distinct.numel()) & (following >= threshold)).int()
        number = number - ((number > 0) & (preceding < threshold)).int()
        return self.until[number]

    def enumerate(self, first: Tensor, last: Tensor, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        """Flat positions, ascending, and products of the ranks ``first`` to ``last`` in rows ``start`` to ``stop``."""
        lengths = (last - first)[start:stop]
        rows = torch.arange(start, start + lengths.numel(), device=first.device).repeat_interleave(lengths)
        begins = lengths.cumsum(0) - lengths
        offsets = (first[start:stop] - begins).repeat_interleave(lengths)
        place = torch.arange(rows.numel(), device=rows.device) + offsets
        positions, order = (rows * self.cols.numel() + self.place[place]).sort()
        return positions, (self.rows[rows] * self.cols[place])[order]


def _check(vector: Tensor, what: str, name: str) -> None:
    where = layer_prefix(name)
    if vector.ndim != 1 or vector.numel() == 0:
        raise ValueError(f"{where}{what} of shape {tuple(vector.shape)}: a 1-D tensor with numbers is expected")
    if not bool((vector.isfinite() & (vector >= 0)).all()):
        raise ValueError(
            f"{where}{what} contain numbers that are negative or not finite; finite numbers of at least 0 are expected"
        )


def _threshold(products: _Products, wanted: int) -> tuple[float, bool]:
    """A lower bound of the ``wanted``-th largest product: ``(bound, whether few products reach it)``.

    The ``wanted`` largest products reach it, or all positive ones do. If many reach it, many are equal to it, and
    fewer than ``wanted`` exceed it.
    """
    low, high = 1, _bits(products.largest) + 1
    reached = int(products.reach(_number(low)).sum())
    while reached > wanted + SLACK and high - low > 1:
        middle = (low + high) // 2
        count = int(products.reach(_number(middle)).sum())
        if count >= wanted:
            low, reached = middle, count
        else:
            high = middle
    return _number(low), reached <= wanted + SLACK


def _ties(products: _Products, above: Tensor, reach: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The products between two thresholds in the order of positions, one panel of rows at a time."""
    until = (reach - above).cumsum(0)
    start, done = 0, 0
    while start < until.numel():
        most = torch.tensor(done + panel_bytes() // ENUMERATED_BYTES, device=until.device)
        stop = max(start + 1, int(torch.searchsorted(until, most, right=True)))
        yield products.enumerate(above, reach, start, stop)
        start, done = stop, int(until[stop - 1])


def topk_outer(
    rows: Tensor,
    cols: Tensor,
    k: int,
    exclude: Support | None = None,
    *,
    name: str = "",
) -> tuple[Tensor, Tensor]:
    """The ``k`` largest products ``rows[i] * cols[j]`` above 0, exactly, in O(rows + cols + k) memory.

    A threshold is found by bisection: binary search counts the products of each row that reach it. Only these are
    enumerated. Where too many products are equal to the last wanted one, they are enumerated by position.

    Args:
        rows: ``(rows,)`` float32, at least 0.
        cols: ``(cols,)`` float32, at least 0.
        k: number of products; fewer are returned if fewer are above 0.
        exclude: positions to leave out.
        name: the layer's name, for error messages.

    Returns:
        Flat row-major positions, ascending int64, and the products there, float32. Among equal products the lowest
        positions win.

    Raises:
        ValueError: vectors that are not 1-D or have negative or non-finite numbers, or a negative ``k``.

    Example:
        >>> import torch
        >>> from sparse_peft.support import topk_outer
        >>> positions, products = topk_outer(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 5.0]), k=2)
        >>> positions.tolist(), products.tolist()
        ([2, 3], [6.0, 15.0])
    """
    _check(rows, "rows", name)
    _check(cols, "cols", name)
    if k < 0:
        raise ValueError(f"{layer_prefix(name)}k={k}: at least 0 is expected")
    products = _Products(rows, cols)
    if k == 0 or products.largest == 0:
        return torch.empty(0, dtype=torch.int64, device=rows.device), torch.empty(0, device=rows.device)
    # the largest k + nnz products contain k that are not excluded
    threshold, few = _threshold(products, k + (0 if exclude is None else exclude.nnz))
    reach = products.reach(threshold)
    certain = reach if few else products.reach(math.nextafter(threshold, math.inf))

    def free(part: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        keep = slice(None) if exclude is None else ~exclude.contains(part[0])
        return part[0][keep], part[1][keep]

    positions, scores = free(products.enumerate(torch.zeros_like(certain), certain))
    best = topk_indices(scores, min(k, scores.numel()))
    parts = [(positions[best], scores[best])]
    missing = k - best.numel()
    for part in _ties(products, certain, reach):
        if missing == 0:
            break
        positions, scores = free(part)
        parts.append((positions[:missing], scores[:missing]))
        missing -= parts[-1][0].numel()
    positions, scores = (torch.cat(column) for column in zip(*parts, strict=True))
    positions, order = positions.sort()
    return positions, scores[order].float()
