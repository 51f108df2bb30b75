"""A layer with a thresholded distance matrix as its delta: only the input, the factors and tau are saved for backward.

The delta is computed one part of the inputs at a time, in the forward pass and again in backward. There the part of
the weight's gradient is formed as well, and released after the factors' gradients. With the base weight given, the
parts are added to it, so that each pass multiplies once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..numerics.tokens import accumulation_dtype
from .distance import FactorGrads, Factors, Threshold, distance_grads_, distance_matrix, full_precision
from .products import MatrixProduct


@dataclass(frozen=True)
class InitialDelta:
    """The initial delta, which is subtracted.

    Attributes:
        factors: the initial ones, which are not trained.
        tau: threshold of ``factors``.
    """

    factors: Factors
    tau: Tensor


@dataclass(frozen=True)
class Competition:
    """How factors become a delta.

    Attributes:
        product: of the layer.
        threshold: of the distance matrix.
        first: subtracted where an entry is kept, so that the initial delta is zero; None for nothing.
        after_backward: called after the factors' gradients were formed.
    """

    product: MatrixProduct
    threshold: Threshold
    first: InitialDelta | None = None
    after_backward: Callable[[], None] | None = None

    def delta(self, value: Tensor, tau: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """The delta of inputs ``start`` to ``stop``, ``(outputs, inputs of the part)``, from the distance matrix."""
        delta = self.threshold.apply(value, tau)
        if self.first is not None:
            began = self.threshold.apply(distance_matrix(self.first.factors, start, stop).value, self.first.tau)
            delta -= began.mul_(value.abs() > tau)
        return delta

    def matrix(
        self, value: Tensor, tau: Tensor, start: int, stop: int, weight: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """The matrix to multiply with: the delta of a part, plus the stored base weight if it is given."""
        delta, product = self.delta(value, tau, start, stop), self.product
        if weight is None:
            return delta.to(dtype)
        if product.in_dim == 0:
            part = weight[start:stop].t()
        else:
            part = weight[:, start // product.taps : stop // product.taps].flatten(1)
        return (part + delta.to(part.dtype)).to(dtype)


class _DistanceLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        inputs: Tensor,
        outputs: Tensor,
        mix: Tensor | None,
        tau: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        how: Competition,
    ) -> Tensor:
        ctx.how = how
        ctx.save_for_backward(x, inputs, outputs, mix, tau, weight)
        factors, product = Factors(inputs, outputs, mix), how.product
        parts = factors.parts(product.taps)
        total: Tensor | None = None
        with full_precision(x.device):
            for start, stop in parts:
                value = distance_matrix(factors, start, stop).value
                matrix = how.matrix(value, tau, start, stop, weight, x.dtype)
                if len(parts) == 1:
                    return product.multiply(x, matrix, bias)
                out = product.multiply(product.part(x, start, stop), matrix, bias if start == 0 else None)
                # a sum over many parts would be rounded at each of them
                total = out.to(accumulation_dtype(x.dtype)) if total is None else total.add_(out)
        return (out if total is None else total).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, inputs, outputs, mix, tau, weight = ctx.saved_tensors
        how, product = ctx.how, ctx.how.product
        factors = Factors(inputs, outputs, mix)
        for_x, *for_factors = ctx.needs_input_grad[:4]
        grad_x = torch.empty_like(x) if for_x else None
        grads = FactorGrads.zeros(factors)
        grad = grad.to(x.dtype)
        with full_precision(x.device):
            for start, stop in factors.parts(product.taps):
                part, seen = distance_matrix(factors, start, stop), product.part(x, start, stop)
                if grad_x is not None:
                    matrix = how.matrix(part.value, tau, start, stop, weight, x.dtype)
                    product.part(grad_x, start, stop).copy_(product.multiply_back(grad, matrix, seen))
                    del matrix
                if any(for_factors):
                    rate = how.threshold.slope(part.value, tau)
                    rate *= product.matrix_grad(grad, seen)
                    distance_grads_(factors, part, rate, start, stop, grads)
        if any(for_factors) and how.after_backward is not None:
            how.after_backward()
        of_factors = (g if wanted else None for g, wanted in zip(grads, for_factors, strict=True))
        grad_bias = product.bias_grad(grad) if ctx.needs_input_grad[6] else None
        return grad_x, *of_factors, None, None, grad_bias, None


def distance_layer(
    x: Tensor,
    factors: Factors,
    tau: Tensor,
    how: Competition,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The output of a thresholded distance matrix, with gradients for the input, the factors and the bias.

    Args:
        x: the layer's input, in the dtype to multiply in.
        factors: in float32 or float64, in which the distances are computed.
        tau: 0-d threshold of the absolute distances.
        how: how the factors become a delta.
        weight: the frozen base weight as stored, to return the whole layer's output; by default the delta's output.
        bias: of the base layer, with its weight.

    Returns:
        The output, in ``x``'s dtype.
    """
    product = how.product
    out = _DistanceLayer.apply(product.enter(x), *factors, tau, weight, bias, how)
    return product.leave(out, x)


@torch.no_grad()
def distance_delta(factors: Factors, tau: Tensor, how: Competition, dtype: torch.dtype) -> Tensor:
    """The whole delta, ``(outputs, inputs)`` in ``dtype``, computed in parts."""
    with full_precision(factors.inputs.device):
        delta = torch.empty(factors.shape, dtype=dtype, device=factors.inputs.device)
        for start, stop in factors.parts(how.product.taps):
            delta[:, start:stop] = how.delta(distance_matrix(factors, start, stop).value, tau, start, stop)
    return delta


@torch.no_grad()
def distance_entries(factors: Factors, tau: Tensor, how: Competition) -> tuple[Tensor, Tensor]:
    """The delta's entries above the threshold.

    Returns:
        ``(entries,)`` int64 positions in the flat ``(outputs, inputs)``, ascending, and their values.
    """
    found: list[tuple[Tensor, Tensor]] = []
    _, inputs = factors.shape
    with full_precision(factors.inputs.device):
        for start, stop in factors.parts(how.product.taps):
            part = distance_matrix(factors, start, stop)
            rows, cols = (part.value.abs() > tau).nonzero(as_tuple=True)
            values = how.delta(part.value, tau, start, stop)[rows, cols]
            found.append((rows * inputs + cols + start, values))
    positions, values = (torch.cat(column) for column in zip(*found, strict=True))
    order = positions.argsort()
    return positions[order], values[order]
