"""How a layer's output follows from its input and its weight.

A *product* multiplies the weight that a ``WeightSource`` returns, and forms the weight's gradient at a support. It
knows neither the values of a delta nor the origin of the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, ParamSpec, Protocol, TypeGuard, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..numerics.tokens import flatten_tokens, transposed_product
from ..support import ChannelSupport, Support, within_lines
from .gradient_observers import observer_of
from .support_grad import observed_support_grad

P = ParamSpec("P")
T = TypeVar("T")


class WeightPanels(Protocol):
    """A weight in panels of rows."""

    @property
    def shape(self) -> tuple[int, int]:
        """``(rows, cols)`` of the weight as a matrix, as stored."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weight as stored."""
        ...

    def panels(self, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
        """``(start, stop, weight[start:stop])`` in ``dtype``, over consecutive ranges of all rows."""
        ...


class WeightSource(WeightPanels, Protocol):
    """The source of a step's effective weight."""

    @property
    def product(self) -> LayerProduct:
        """The layer's product."""
        ...

    @property
    def key(self) -> int:
        """The layer's key, for observers."""
        ...

    def read(self, act: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of ``act``, which reads panels; nothing else changes the weight meanwhile."""
        ...

    def after_backward(self) -> None:
        """Called after the values' gradient was formed."""
        ...


class LayerProduct(Protocol):
    """The product of one kind of layer."""

    @property
    def in_dim(self) -> int:
        """The dimension of input features of the weight as a matrix."""
        ...

    def enter(self, x: Tensor) -> Tensor:
        """The input as the other methods take it; differentiable."""
        ...

    def leave(self, out: Tensor, x: Tensor) -> Tensor:
        """The layer's output, from the result of ``forward`` and the input that ``enter`` was given."""
        ...

    def forward(self, x: Tensor, source: WeightPanels, bias: Tensor | None) -> Tensor:
        """The layer's output."""
        ...

    def input_grad(self, grad: Tensor, source: WeightPanels, shape: torch.Size) -> Tensor:
        """The gradient of an input of this shape."""
        ...

    def keep(self, x: Tensor, support: Support) -> Tensor:
        """The part of the input that the gradient at a support needs: the input, or a copy of its trained channels.

        A copy and no view, since a view would keep the whole input in memory.
        """
        ...

    def support_grad(self, grad: Tensor, kept: Tensor, support: Support, key: int) -> Tensor:
        """The weight's gradient at a support, ``(entries,)`` in at least float32, from the result of ``keep``."""
        ...

    def bias_grad(self, grad: Tensor) -> Tensor:
        """The bias's gradient."""
        ...

    def multiply(self, x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        """The layer's output with a dense matrix ``(outputs, inputs)``, or with a part of its inputs."""
        ...


class MatrixProduct(LayerProduct, Protocol):
    """The product of a layer whose input is a tensor of features, as methods with factors use it."""

    @property
    def taps(self) -> int:
        """Inputs of the weight's matrix per channel of the layer's input."""
        ...

    def low_rank(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """The layer's output with the weight ``up @ down``, which is never formed.

        Args:
            x: the layer's input.
            down: ``(rank, inputs)``; a convolution's inputs are its input channels times its taps.
            up: ``(outputs, rank)``.
        """
        ...

    # Products with a part of the weight's inputs, as the dense matrix ``(outputs, inputs of the part)``.

    def part(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Slice of the input for the weight matrix's inputs ``start`` to ``stop``, in whole channels."""
        ...

    def multiply_back(self, grad: Tensor, matrix: Tensor, x: Tensor) -> Tensor:
        """The gradient of a part of the input, of the shape of ``x``."""
        ...

    def matrix_grad(self, grad: Tensor, x: Tensor) -> Tensor:
        """The gradient of the part's matrix."""
        ...


def trains_input_channels(support: Support, in_dim: int) -> TypeGuard[ChannelSupport]:
    """Whether a support consists of whole input channels, whose gradient needs no other channel of the input."""
    return isinstance(support, ChannelSupport) and support.dim == in_dim


@dataclass(frozen=True)
class LinearProduct:
    """``x @ W.T``, or ``x @ W`` for a weight stored ``(in, out)``.

    Attributes:
        in_dim: the dimension of input features of the stored weight: 1 for ``nn.Linear``, 0 for GPT-2's ``Conv1D``.
    """

    in_dim: int
    taps: ClassVar[int] = 1

    def enter(self, x: Tensor) -> Tensor:
        return x

    def leave(self, out: Tensor, x: Tensor) -> Tensor:
        return out

    def forward(self, x: Tensor, source: WeightPanels, bias: Tensor | None) -> Tensor:
        return self._multiply(x, source, self.in_dim == 1, bias)

    def input_grad(self, grad: Tensor, source: WeightPanels, shape: torch.Size) -> Tensor:
        return self._multiply(grad, source, self.in_dim == 0)

    @staticmethod
    def _multiply(x: Tensor, source: WeightPanels, t: bool, bias: Tensor | None = None) -> Tensor:
        """``x @ W.T`` if ``t`` else ``x @ W``, plus ``bias``, over the source's panels."""
        rows, cols = source.shape
        out: Tensor | None = None
        for start, stop, weight in source.panels(x.dtype):
            if stop - start == rows:
                return F.linear(x, weight, bias) if t else F.linear(x, weight.t(), bias)
            if out is None:
                out = x.new_empty(*x.shape[:-1], rows) if t else x.new_zeros(*x.shape[:-1], cols)
            if t:
                out[..., start:stop] = F.linear(x, weight)
            else:
                out += F.linear(x[..., start:stop], weight.t())
        if out is None:
            raise ValueError(f"the source of a weight of {rows} x {cols} returned no panels")
        return out if bias is None else out.add_(bias)

    def keep(self, x: Tensor, support: Support) -> Tensor:
        return x.index_select(-1, support.channels) if trains_input_channels(support, self.in_dim) else x

    def support_grad(self, grad: Tensor, kept: Tensor, support: Support, key: int) -> Tensor:
        of_channels = trains_input_channels(support, self.in_dim)
        if of_channels and support.nnz == 0:
            return grad.new_zeros(0)  # an empty tensor was kept, whose number of tokens is unknown
        left, right = flatten_tokens(grad), flatten_tokens(kept)
        if not of_channels and right.shape[1] != support.shape[self.in_dim]:
            if observer_of(key) is not None:
                raise RuntimeError(
                    "an observer of a weight's whole gradient needs all inputs of the layer, and columns= keeps those "
                    "with entries; train without columns="
                )
            support = within_lines(support, self.in_dim)[1]
        if self.in_dim == 0:
            left, right = right, left
        return (
            transposed_product(left, right).reshape(-1)
            if of_channels
            else observed_support_grad(left, right, support, key)
        )

    def bias_grad(self, grad: Tensor) -> Tensor:
        return flatten_tokens(grad).sum(0)

    def low_rank(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return F.linear(F.linear(x, down), up)

    def part(self, x: Tensor, start: int, stop: int) -> Tensor:
        return x[..., start:stop]

    def multiply(self, x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, matrix, bias)

    def multiply_back(self, grad: Tensor, matrix: Tensor, x: Tensor) -> Tensor:
        return F.linear(grad, matrix.t())

    def matrix_grad(self, grad: Tensor, x: Tensor) -> Tensor:
        return transposed_product(flatten_tokens(grad), flatten_tokens(x))
