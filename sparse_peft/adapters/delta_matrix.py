"""One layer's delta as a matrix that is never formed: what can be said of it from its entries and factors."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from ..support import Support
from ..tuners.forms import Forms


class DeltaMatrix:
    """A delta as a map from inputs to outputs, float64 on the CPU.

    Args:
        state: the layer's trained state.
        in_dim: which dimension of the stored weight is the input's; as the factors have it if None, and 1 without.

    Attributes:
        shape: ``(outputs, inputs)``.
        support, values: of the sparse part, as stored; None without.
        factors: ``(rank, inputs)`` and ``(outputs, rank)`` of the low-rank part; None without.

    Raises:
        ValueError: the delta has neither entries nor factors.
    """

    support: Support | None = None
    values: Tensor | None = None
    factors: tuple[Tensor, Tensor] | None = None

    def __init__(self, state: Forms, in_dim: int | None = None):
        entries, factors = state.sparse_part(), state.low_rank_part()
        if entries is None and factors is None:
            raise state.no_form("matrix form", state.why_no_parts)
        if factors is not None:
            down, up = (factor.cpu().double() for factor in factors)
            self.factors = down, up
            self.shape = up.shape[0], down.shape[1]
        if in_dim is None and entries is not None and factors is not None:
            in_dim = 1 if entries.support.shape == self.shape else 0
        self.in_dim = 1 if in_dim is None else in_dim
        if entries is not None:
            self.support, self.values = entries.support.to("cpu"), entries.values.cpu().double()
            rows, cols = entries.support.shape
            self.shape = (rows, cols) if self.in_dim == 1 else (cols, rows)

    @cached_property
    def _sparse(self) -> Tensor:
        where = torch.stack([self.support.rows, self.support.cols]).long()
        where = where if self.in_dim == 1 else where.flip(0)
        return torch.sparse_coo_tensor(where, self.values, self.shape, check_invariants=True).coalesce()

    def times(self, x: Tensor) -> Tensor:
        """``(outputs, n)`` of ``(inputs, n)``."""
        parts = [] if self.support is None else [torch.sparse.mm(self._sparse, x)]
        if self.factors is not None:
            down, up = self.factors
            parts.append(up @ (down @ x))
        return sum(parts)

    def transposed_times(self, x: Tensor) -> Tensor:
        """``(inputs, n)`` of ``(outputs, n)``."""
        parts = [] if self.support is None else [torch.sparse.mm(self._sparse.t(), x)]
        if self.factors is not None:
            down, up = self.factors
            parts.append(down.t() @ (up.t() @ x))
        return sum(parts)

    def inner(self, other: DeltaMatrix) -> float:
        """Sum of the products of two deltas' entries."""
        total = 0.0
        if self.support is not None and other.support is not None:
            both = self.support.contains(other.support.indices)
            slots = self.support.slots(other.support.indices[both])
            total += float((self.values[slots] * other.values[both]).sum())
        if other.factors is not None:
            down, up = other.factors
            total += float((up * self.times(down.t())).sum())
        if self.factors is not None and other.support is not None:
            down, up = self.factors
            total += float((up * torch.sparse.mm(other._sparse, down.t())).sum())
        return total

    def square(self) -> float:
        """Sum of squares of its entries."""
        return self.inner(self)

    def squared_error(self, down: Tensor, up: Tensor) -> float:
        """Sum of squares of what ``up @ down`` lacks."""
        down, up = down.double(), up.double()
        cross = float((up * self.times(down.t())).sum())
        own = float(((up.t() @ up) * (down @ down.t())).sum())
        return max(0.0, self.square() - 2 * cross + own)
