"""Layers whose weight is trained at a support: forward and backward on the *effective* weight.

Only the input is saved for backward, or of it what the support needs. The effective weight is asked for again there,
from a ``WeightSource``: a resident weight costs nothing, an overlay or a dequantised buffer is made anew and dropped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..support import Support
from .products import WeightSource


class _SupportLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, values, bias, source, support):
        ctx.source, ctx.support, ctx.shape = source, support, x.shape
        ctx.values_dtype = None if values is None else values.dtype
        ctx.save_for_backward(source.product.keep(x, support) if ctx.needs_input_grad[1] else None)
        return source.product.forward(x, source, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (kept,) = ctx.saved_tensors
        source = ctx.source
        grad_x = grad_values = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = source.product.input_grad(grad, source, ctx.shape)
        if ctx.needs_input_grad[1]:
            grad_values = source.product.support_grad(grad, kept, ctx.support, source.key).to(ctx.values_dtype)
            source.after_backward()
        if ctx.needs_input_grad[2]:
            grad_bias = source.product.bias_grad(grad)
        return grad_x, grad_values, grad_bias, None, None


def support_layer(
    x: Tensor, values: Tensor | None, bias: Tensor | None, source: WeightSource, support: Support | None
) -> Tensor:
    """The layer's output on its effective weight, with gradients for ``x``, ``values`` and ``bias``.

    Args:
        x: the input, of the shape that ``source.product`` takes, in the dtype to compute in.
        values: ``(entries,)`` trained delta at ``support``, whose effect on the weight is the source's business; None
            for the base weight alone.
        bias: ``(out_features,)`` or None.
        source: gives the effective weight, in forward and again in backward.
        support: of the values.

    Returns:
        The output in ``x``'s dtype.
    """
    product = source.product
    return product.leave(_SupportLayer.apply(product.enter(x), values, bias, source, support), x)
