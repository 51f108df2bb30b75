"""The largest products of two vectors, without the matrix of all of them."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator

import torch
from torch import Tensor

from ..numerics.topk import topk_indices
from .support import Support

# Products beyond the wanted ones that are cheaper to sort than to rule out by a finer threshold.
SLACK = 4096
# Bytes that enumerating one product takes: its row, place, position and value.
ENUMERATED_BYTES = 64


def _bits(number: float) -> int:
    """A positive float64 as the integer that orders like it."""
    return struct.unpack("<q", struct.pack("<d", number))[0]


def _number(bits: int) -> float:
    return struct.unpack("<d", struct.pack("<q", bits))[0]


class _Products:
    """Products ``rows[i] * cols[j]`` in float64, where those of float32 numbers are exact."""

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
        """``(rows,)`` how many products of each row are at least a threshold above 0: the first ones by ``place``."""
        number = torch.searchsorted(self._ascending, (threshold / self.rows).neg(), right=True)
        # the division rounds; the products of the distinct numbers on both sides of the bound do not
        following = self.distinct[number.clamp(max=self.distinct.numel() - 1)] * self.rows
        preceding = self.distinct[(number - 1).clamp(min=0)] * self.rows
        number = number + ((number < self.distinct.numel()) & (following >= threshold)).int()
        number = number - ((number > 0) & (preceding < threshold)).int()
        return self.until[number]

    def enumerate(self, first: Tensor, last: Tensor, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        """Flat positions, ascending, and products of the places ``first`` to ``last`` of the rows of a range."""
        lengths = (last - first)[start:stop]
        rows = torch.arange(start, start + lengths.numel(), device=first.device).repeat_interleave(lengths)
        begins = lengths.cumsum(0) - lengths
        offsets = (first[start:stop] - begins).repeat_interleave(lengths)
        place = torch.arange(rows.numel(), device=rows.device) + offsets
        positions, order = (rows * self.cols.numel() + self.place[place]).sort()
        return positions, (self.rows[rows] * self.cols[place])[order]


def _check(vector: Tensor, what: str, name: str) -> None:
    where = f"layer {name}: " if name else ""
    if vector.ndim != 1 or vector.numel() == 0:
        raise ValueError(f"{where}{what} of shape {tuple(vector.shape)}: a 1-D tensor with numbers is expected")
    if not bool((vector.isfinite() & (vector >= 0)).all()):
        raise ValueError(
            f"{where}{what} contain numbers that are negative or not finite; their products have no order"
        )


def _threshold(products: _Products, wanted: int) -> tuple[float, bool]:
    """The lowest bound of the search for the ``wanted``-th largest product: ``(bound, whether few reach it)``.

    All of the ``wanted`` largest reach it, or all that are above 0 do. If not few do, the products equal to it are
    to blame, and fewer than ``wanted`` exceed it.
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


def _ties(products: _Products, above: Tensor, reach: Tensor, panel_bytes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """What lies between two thresholds, in the order of positions, a block of rows at a time."""
    until = (reach - above).cumsum(0)
    start, done = 0, 0
    while start < until.numel():
        most = torch.tensor(done + panel_bytes // ENUMERATED_BYTES, device=until.device)
        stop = max(start + 1, int(torch.searchsorted(until, most, right=True)))
        yield products.enumerate(above, reach, start, stop)
        start, done = stop, int(until[stop - 1])


def topk_outer(
    rows: Tensor,
    cols: Tensor,
    k: int,
    exclude: Support | None = None,
    *,
    panel_bytes: int = 64 * 2**20,
    name: str = "",
) -> tuple[Tensor, Tensor]:
    """The ``k`` largest products ``rows[i] * cols[j]`` above 0, exactly, in O(rows + cols + k) memory.

    A threshold is found by bisection, counting what reaches it in each row by binary search; only that is enumerated.
    Where too many products are equal to the last one wanted, they are gone through in the order of their positions.

    Args:
        rows: ``(rows,)`` float32, at least 0.
        cols: ``(cols,)`` float32, at least 0.
        k: how many; fewer come back if fewer products are above 0.
        exclude: positions that do not count.
        panel_bytes: limit of a temporary's size where many products are equal.
        name: the layer's name, for error messages.

    Returns:
        Flat row-major positions, ascending int64, and the products there, float32. Among equal products the lowest
        positions win.

    Raises:
        ValueError: vectors with negative or non-finite numbers or of other shapes, or a negative ``k``.
    """
    _check(rows, "rows", name)
    _check(cols, "cols", name)
    if k < 0:
        raise ValueError(f"{f'layer {name}: ' if name else ''}k={k}: at least 0 is expected")
    products = _Products(rows, cols)
    if k == 0 or products.largest == 0:
        return torch.empty(0, dtype=torch.int64, device=rows.device), torch.empty(0, device=rows.device)
    # so many of the largest products hold k that are not excluded
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
    for part in _ties(products, certain, reach, panel_bytes):
        if missing == 0:
            break
        positions, scores = free(part)
        parts.append((positions[:missing], scores[:missing]))
        missing -= parts[-1][0].numel()
    positions, scores = (torch.cat(column) for column in zip(*parts, strict=True))
    positions, order = positions.sort()
    return positions, scores[order].float()
