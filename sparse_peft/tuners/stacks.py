"""Several adapters of one layer side by side, so that a batch whose inputs use them costs one product."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ..ops import BatchOrder, add_channel_deltas_, add_entry_deltas_, diagonal_of, suits_one_product
from ..support import ChannelSupport
from .changes import Stamp
from .delta import Delta


@dataclass(frozen=True)
class Stack(ABC):
    """Adapters' values in an input's dtype; serves as long as nothing is written to what it was made of.

    Attributes:
        names: the adapters, sorted.
        stamp: of their values.
        dtype: of the inputs it was made for.
    """

    names: tuple[str, ...]
    stamp: Stamp
    dtype: torch.dtype

    def serves(self, names: tuple[str, ...], x: Tensor) -> bool:
        return self.names == names and self.dtype == x.dtype and self.stamp.is_current()

    @classmethod
    @abstractmethod
    def of(cls, deltas: Mapping[str, Delta], in_dim: int, dtype: torch.dtype) -> Self | None:
        """Made of a layer's adapters for inputs of a dtype; None where they do not go together."""

    @staticmethod
    def suits(order: BatchOrder, tokens: int) -> bool:
        """Whether it is the cheaper way for items of this many tokens."""
        return True

    @abstractmethod
    def add_(self, result: Tensor, x: Tensor, order: BatchOrder) -> None:
        """Add to each item's result what its adapter makes of its input."""


@dataclass(frozen=True)
class EntryStack(Stack):
    """Single entries: the deltas, as maps from inputs to outputs, are the blocks of a sparse matrix's diagonal."""

    diagonal: Tensor

    @classmethod
    def of(cls, deltas: Mapping[str, Delta], in_dim: int, dtype: torch.dtype) -> Self:
        supports, values = [], []
        for delta in deltas.values():
            support, own = delta.support, delta().detach()
            if in_dim == 0:
                support, order = support.transposed
                own = own[order]
            supports.append(support)
            values.append(own)
        stamp = Stamp(tuple(deltas.values()))
        return cls(tuple(deltas), stamp, dtype, diagonal_of(supports, values, dtype))

    @staticmethod
    def suits(order: BatchOrder, tokens: int) -> bool:
        return suits_one_product(order, tokens)

    def add_(self, result: Tensor, x: Tensor, order: BatchOrder) -> None:
        add_entry_deltas_(result, x, self.diagonal, order)


@dataclass(frozen=True)
class ChannelStack(Stack):
    """Whole channels: dense matrices for a batched product.

    Attributes:
        weights: ``(adapters, in, out)``: what multiplies their inputs; shorter ones are filled up with zeros.
        channels: ``(adapters, most channels)`` int64.
        is_input: whether the channels are the layer's inputs.
    """

    weights: Tensor
    channels: Tensor
    is_input: bool

    @classmethod
    def of(cls, deltas: Mapping[str, Delta], in_dim: int, dtype: torch.dtype) -> Self | None:
        """None where some have rows and others columns."""
        supports = [support for delta in deltas.values() if isinstance(support := delta.support, ChannelSupport)]
        if len(supports) < len(deltas) or len({support.dim for support in supports}) > 1:
            return None
        most, dim, device = max(support.count for support in supports), supports[0].dim, supports[0].device
        shape = list(supports[0].matrix_shape)
        shape[dim] = most
        weights = torch.zeros(len(deltas), *shape, dtype=dtype, device=device)
        channels = torch.zeros(len(deltas), most, dtype=torch.int64, device=device)
        for n, (delta, support) in enumerate(zip(deltas.values(), supports, strict=True)):
            weights[n].narrow(dim, 0, support.count).copy_(delta().view(support.matrix_shape))
            channels[n, : support.count] = support.channels
        # stored (out, in) by nn.Linear; a product wants (in, out)
        weights = weights.transpose(1, 2).contiguous() if in_dim == 1 else weights
        return cls(tuple(deltas), Stamp(tuple(deltas.values())), dtype, weights, channels, dim == in_dim)

    def add_(self, result: Tensor, x: Tensor, order: BatchOrder) -> None:
        add_channel_deltas_(result, x, self.weights, self.channels, order, self.is_input)
