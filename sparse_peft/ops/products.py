"""How a layer's output comes from its input and its weight: the product of a linear layer.

A *product* knows nothing of supports' values or of where the weight comes from; it multiplies what a
``WeightSource`` gives it, and forms the weight's gradient at a support.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..numerics.tokens import flatten_tokens, transposed_product
from ..support import ChannelSupport, Support
from .support_grad import observed_support_grad


class WeightSource(Protocol):
    """Where a step's effective weight comes from.

    ``shape`` is that of the weight as a matrix, as stored; ``product`` the layer's; ``key`` the layer's for observers.
    """

    shape: tuple[int, int]
    product: LayerProduct
    key: int

    def panels(self, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
        """``(start, stop, weight[start:stop])`` in ``dtype``, over consecutive rows, together all rows."""
        ...

    def after_backward(self) -> None:
        """Called once the values' gradient was formed."""
        ...


class LayerProduct(Protocol):
    """One kind of layer.

    ``in_dim`` is the dimension of the weight, as a matrix, that is the input's.
    """

    in_dim: int

    def enter(self, x: Tensor) -> Tensor:
        """The input as the other methods take it; differentiable."""
        ...

    def leave(self, out: Tensor, x: Tensor) -> Tensor:
        """The layer's output from that of ``forward``, for the input that was given to ``enter``."""
        ...

    def forward(self, x: Tensor, source: WeightSource, bias: Tensor | None) -> Tensor:
        """The layer's output."""
        ...

    def input_grad(self, grad: Tensor, source: WeightSource, shape: torch.Size) -> Tensor:
        """The gradient of an input of this shape."""
        ...

    def keep(self, x: Tensor, support: Support) -> Tensor:
        """What of the input the gradient at a support needs: the input, or a copy of its trained channels alone.

        A copy, not a view: a view would keep all of the input alive.
        """
        ...

    def support_grad(self, grad: Tensor, kept: Tensor, support: Support, key: int) -> Tensor:
        """The weight's gradient at a support, ``(entries,)`` in at least float32, from what ``keep`` kept."""
        ...

    def bias_grad(self, grad: Tensor) -> Tensor:
        """The bias's gradient."""
        ...

    def low_rank(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """What the layer makes of its input with the weight ``up @ down`` alone, which is never formed.

        Args:
            x: the layer's input.
            down: ``(rank, inputs)``; a convolution's inputs are its input channels times its taps.
            up: ``(outputs, rank)``.
        """
        ...

    # Products with a part of the weight's inputs, as the dense matrix ``(outputs, inputs of the part)``.

    taps: int  # inputs of the weight's matrix for each channel of the layer's input

    def part(self, x: Tensor, start: int, stop: int) -> Tensor:
        """What of a layer's input belongs to inputs ``start`` to ``stop`` of the matrix, whole channels."""
        ...

    def multiply(self, x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        """The layer's output for this part of the input alone."""
        ...

    def multiply_back(self, grad: Tensor, matrix: Tensor, x: Tensor) -> Tensor:
        """The gradient of a part of the input, of the shape of ``x``."""
        ...

    def matrix_grad(self, grad: Tensor, x: Tensor) -> Tensor:
        """The gradient of the part's matrix."""
        ...


def trains_input_channels(support: Support, in_dim: int) -> bool:
    """Whether a support is of whole input channels, whose gradient needs no other channel of the input."""
    return isinstance(support, ChannelSupport) and support.dim == in_dim


@dataclass(frozen=True)
class LinearProduct:
    """``x @ W.T``, or ``x @ W`` for a weight stored ``(in, out)``.

    Attributes:
        in_dim: the dimension of the stored weight that is the input's: 1 for ``nn.Linear``, 0 for GPT-2's ``Conv1D``.
    """

    in_dim: int

    def enter(self, x: Tensor) -> Tensor:
        return x

    def leave(self, out: Tensor, x: Tensor) -> Tensor:
        return out

    def forward(self, x: Tensor, source: WeightSource, bias: Tensor | None) -> Tensor:
        return self._multiply(x, source, self.in_dim == 1, bias)

    def input_grad(self, grad: Tensor, source: WeightSource, shape: torch.Size) -> Tensor:
        return self._multiply(grad, source, self.in_dim == 0)

    @staticmethod
    def _multiply(x: Tensor, source: WeightSource, t: bool, bias: Tensor | None = None) -> Tensor:
        """``x @ W.T`` if ``t`` else ``x @ W``, plus ``bias``, on whatever panels the source gives."""
        rows = source.shape[0]
        out = None
        for start, stop, weight in source.panels(x.dtype):
            if stop - start == rows:
                return F.linear(x, weight if t else weight.t(), bias)
            if out is None:
                out = x.new_empty(*x.shape[:-1], source.shape[0] if t else source.shape[1])
                out.zero_() if not t else None
            if t:
                out[..., start:stop] = F.linear(x, weight)
            else:
                out += F.linear(x[..., start:stop], weight.t())
        return out if bias is None else out.add_(bias)

    def keep(self, x: Tensor, support: Support) -> Tensor:
        return x.index_select(-1, support.channels) if trains_input_channels(support, self.in_dim) else x

    def support_grad(self, grad: Tensor, kept: Tensor, support: Support, key: int) -> Tensor:
        if support.nnz == 0:  # nothing was kept, which no shape can be told from
            return grad.new_zeros(0)
        left, right = flatten_tokens(grad), flatten_tokens(kept)
        if self.in_dim == 0:
            left, right = right, left
        if trains_input_channels(support, self.in_dim):
            return transposed_product(left, right).reshape(-1)
        return observed_support_grad(left, right, support, key)

    def bias_grad(self, grad: Tensor) -> Tensor:
        return flatten_tokens(grad).sum(0)

    def low_rank(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return F.linear(F.linear(x, down), up)

    taps = 1

    def part(self, x: Tensor, start: int, stop: int) -> Tensor:
        return x[..., start:stop]

    def multiply(self, x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, matrix, bias)

    def multiply_back(self, grad: Tensor, matrix: Tensor, x: Tensor) -> Tensor:
        return F.linear(grad, matrix.t())

    def matrix_grad(self, grad: Tensor, x: Tensor) -> Tensor:
        return transposed_product(flatten_tokens(grad), flatten_tokens(x))
