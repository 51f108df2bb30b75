"""The part of a stored matrix that one process holds: a range of its rows, or of its columns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .support import Support


@dataclass(frozen=True)
class Shard:
    """Consecutive rows or columns of a matrix.

    Attributes:
        shape: ``(rows, cols)`` of the whole matrix, as stored.
        dim: 0 for rows, 1 for columns.
        start: the first one.
        stop: the last one + 1.

    Example:
        >>> import torch
        >>> from sparse_peft.support import Shard, Support
        >>> part, slots = Shard((4, 4), dim=1, start=2, stop=4).cut(Support((4, 4), torch.tensor([1, 2, 7])))
        >>> part.shape, part.indices.tolist(), slots.tolist()
        ((4, 2), [0, 3], [1, 2])
    """

    shape: tuple[int, int]
    dim: int
    start: int
    stop: int

    @classmethod
    def of(cls, shape: tuple[int, int], dim: int, number: int, parts: int) -> Shard:
        """Part ``number`` of ``parts`` equal ones, of which the last ones may be shorter or empty, as torch chunks.

        Args:
            shape: ``(rows, cols)`` of the whole matrix.
            dim: that is divided.
            number: of the part.
            parts: their number.
        """
        size, each = shape[dim], -(-shape[dim] // parts)
        return cls(shape, dim, min(number * each, size), min((number + 1) * each, size))

    @property
    def local_shape(self) -> tuple[int, int]:
        """``(rows, cols)`` of the part."""
        count = self.stop - self.start
        return (count, self.shape[1]) if self.dim == 0 else (self.shape[0], count)

    def cut(self, support: Support) -> tuple[Support, Tensor]:
        """The entries of a support that lie in the part; computed once for each support.

        Returns:
            The support of the part's matrix, and the int64 slots of its entries in the whole support.
        """
        key = f"shard {self.dim} {self.start} {self.stop}"
        if key not in support.derived:
            support.derived[key] = self._cut(support)
        return support.derived[key]

    def _cut(self, support: Support) -> tuple[Support, Tensor]:
        if self.dim == 1:
            return support.of_columns(self.start, self.stop)
        part, first, last = support.of_rows(self.start, self.stop)
        return part, torch.arange(first, last, device=support.device)
