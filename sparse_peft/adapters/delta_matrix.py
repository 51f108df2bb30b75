"""One layer's delta as a matrix that is never formed, only multiplied by its entries and factors."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from ..support import Support
from ..tuners.forms import Entries, Forms


class DeltaMatrix:
    """A delta as a map from inputs to outputs, float64 on the CPU.

    Args:
        state: the layer's trained state.
        in_dim: which dimension of the stored weight is the input's; as the factors have it if None, and 1 without.

    Attributes:
        shape: ``(outputs, inputs)``.
        entries: of the sparse part, as stored; None without.
        factors: ``(rank, inputs)`` and ``(outputs, rank)`` of the low-rank part; None without.

    Raises:
        ValueError: the delta has neither entries nor factors.
    """

    def __init__(self, state: Forms, in_dim: int | None = None):
        entries, factors = state.sparse_part(), state.low_rank_part()
        if entries is None and factors is None:
            raise state.no_form("matrix form", state.why_no_parts)
        self.factors = factors and (factors[0].cpu().double(), factors[1].cpu().double())
        self.entries = entries and Entries(entries.support.to("cpu"), entries.values.cpu().double())
        shape = None if self.factors is None else (self.factors[1].shape[0], self.factors[0].shape[1])
        if self.entries is not None:
            rows, cols = self.entries.support.shape
            if in_dim is None:
                in_dim = 1 if shape in (None, (rows, cols)) else 0
            shape = (rows, cols) if in_dim == 1 else (cols, rows)
        self.in_dim = 1 if in_dim is None else in_dim
        self.shape: tuple[int, int] = shape or (0, 0)

    @property
    def support(self) -> Support | None:
        """Of the sparse part; None without."""
        return None if self.entries is None else self.entries.support

    @cached_property
    def _sparse(self) -> Tensor | None:
        if self.entries is None:
            return None
        support = self.entries.support
        where = torch.stack([support.rows, support.cols]).long()
        where = where if self.in_dim == 1 else where.flip(0)
        return torch.sparse_coo_tensor(where, self.entries.values, self.shape, check_invariants=True).coalesce()

    def times(self, x: Tensor) -> Tensor:
        """``(outputs, n)`` of ``(inputs, n)``."""
        product = x.new_zeros(self.shape[0], x.shape[1])
        if self._sparse is not None:
            product = product + torch.sparse.mm(self._sparse, x)
        if self.factors is not None:
            down, up = self.factors
            product = product + up @ (down @ x)
        return product

    def transposed_times(self, x: Tensor) -> Tensor:
        """``(inputs, n)`` of ``(outputs, n)``."""
        product = x.new_zeros(self.shape[1], x.shape[1])
        if self._sparse is not None:
            product = product + torch.sparse.mm(self._sparse.t(), x)
        if self.factors is not None:
            down, up = self.factors
            product = product + down.t() @ (up.t() @ x)
        return product

    def inner(self, other: DeltaMatrix) -> float:
        """Sum of the products of two deltas' entries."""
        total = 0.0
        if self.entries is not None and other.entries is not None:
            indices = other.entries.support.indices
            both = self.entries.support.contains(indices)
            slots = self.entries.support.slots(indices[both])
            total += float((self.entries.values[slots] * other.entries.values[both]).sum())
        if other.factors is not None:
            down, up = other.factors
            total += float((up * self.times(down.t())).sum())
        if self.factors is not None and other._sparse is not None:
            down, up = self.factors
            total += float((up * torch.sparse.mm(other._sparse, down.t())).sum())
        return total

    def square(self) -> float:
        """Sum of squares of its entries."""
        return self.inner(self)

    def squared_error(self, down: Tensor, up: Tensor) -> float:
        """Sum of squares of the delta minus ``up @ down``."""
        down, up = down.double(), up.double()
        cross = float((up * self.times(down.t())).sum())
        own = float(((up.t() @ up) * (down @ down.t())).sum())
        return max(0.0, self.square() - 2 * cross + own)
