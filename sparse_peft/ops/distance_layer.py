"""A layer with a kernelised delta: the input, the factors and tau are all that is kept for backward.

The delta is computed a part of the inputs at a time, in the forward pass and again in backward, where the part of the
weight's gradient is formed as well and dropped once the factors' gradients were taken from it. With the base weight at
hand the parts are added to it, so that each pass multiplies once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..numerics.tokens import accumulation_dtype
from .distance import Factors, Threshold, distance_grads_, distance_matrix, full_precision
from .products import LayerProduct


@dataclass(frozen=True)
class First:
    """What a delta began as, and what is subtracted from it.

    Attributes:
        factors: the first ones, which are not trained.
        tau: theirs.
    """

    factors: Factors
    tau: Tensor


@dataclass(frozen=True)
class Competition:
    """How factors become a delta.

    Attributes:
        product: the layer's.
        threshold: of its kernel.
        first: subtracted where an entry is kept, so that the delta starts as zero; None for nothing.
        after_backward: called once gradients of the factors were formed.
    """

    product: LayerProduct
    threshold: Threshold
    first: First | None = None
    after_backward: Callable[[], None] | None = None

    def delta(self, value: Tensor, tau: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """The part of the delta that the kernel's value gives, ``(outputs, inputs of the part)``."""
        delta = self.threshold.apply(value, tau)
        if self.first is not None:
            began = self.threshold.apply(distance_matrix(self.first.factors, start, stop).value, self.first.tau)
            delta -= began.mul_(value.abs() > tau)
        return delta


def _matrix(delta: Tensor, weight: Tensor | None, product: LayerProduct, start: int, stop: int, dtype: torch.dtype):
    """The part of the matrix to multiply with: the delta's, on top of the base weight's if that is given."""
    if weight is None:
        return delta.to(dtype)
    if product.in_dim == 0:
        part = weight[start:stop].t()
    else:
        part = weight[:, start // product.taps : stop // product.taps].flatten(1)
    return (part + delta.to(part.dtype)).to(dtype)


class _DistanceLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, inputs, outputs, mix, tau, weight, bias, how: Competition):
        ctx.how = how
        ctx.save_for_backward(x, inputs, outputs, mix, tau, weight)
        factors, product = Factors(inputs, outputs, mix), how.product
        parts = factors.parts(product.taps)
        total = None
        with full_precision(x.device):
            for start, stop in parts:
                delta = how.delta(distance_matrix(factors, start, stop).value, tau, start, stop)
                matrix = _matrix(delta, weight, product, start, stop, x.dtype)
                if len(parts) == 1:
                    return product.multiply(x, matrix, bias)
                out = product.multiply(product.part(x, start, stop), matrix, bias if start == 0 else None)
                # of many parts' sums each would be rounded
                total = out.to(accumulation_dtype(x.dtype)) if total is None else total.add_(out)
        return total.to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, inputs, outputs, mix, tau, weight = ctx.saved_tensors
        how, product = ctx.how, ctx.how.product
        factors = Factors(inputs, outputs, mix)
        for_x, *for_factors = ctx.needs_input_grad[:4]
        grad_x = torch.empty_like(x) if for_x else None
        grads = tuple(None if t is None else torch.zeros_like(t) for t in factors)
        grad = grad.to(x.dtype)
        with full_precision(x.device):
            for start, stop in factors.parts(product.taps):
                part, seen = distance_matrix(factors, start, stop), product.part(x, start, stop)
                if for_x:
                    matrix = _matrix(how.delta(part.value, tau, start, stop), weight, product, start, stop, x.dtype)
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
    """What a kernelised delta makes of an input, with gradients for the input, the factors and the bias.

    Args:
        x: the layer's input, in the dtype to multiply in.
        factors: in float32 (or float64), in which the kernel is computed.
        tau: 0-d threshold of the kernel's absolute values.
        how: the rest.
        weight: the frozen base weight as stored, for the whole layer's output instead of the delta's alone.
        bias: of the base layer, with its weight.

    Returns:
        The output, in ``x``'s dtype.
    """
    product = how.product
    out = _DistanceLayer.apply(product.enter(x), *factors, tau, weight, bias, how)
    return product.leave(out, x)


@torch.no_grad()
def distance_delta(factors: Factors, tau: Tensor, how: Competition, dtype: torch.dtype) -> Tensor:
    """The delta as a whole, ``(outputs, inputs)`` in ``dtype``, computed in parts."""
    with full_precision(factors.inputs.device):
        delta = torch.empty(factors.shape, dtype=dtype, device=factors.inputs.device)
        for start, stop in factors.parts(how.product.taps):
            delta[:, start:stop] = how.delta(distance_matrix(factors, start, stop).value, tau, start, stop)
    return delta


@torch.no_grad()
def distance_entries(factors: Factors, tau: Tensor, how: Competition) -> tuple[Tensor, Tensor]:
    """The entries that are kept.

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
