"""Layers whose weight is trained at a support: forward and backward with the *effective* weight.

Only the input, or the part of it that the support needs, is saved for backward. The effective weight is requested from
a ``WeightSource`` in both passes: a resident weight costs nothing, an overlay or a dequantised buffer is built again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..support import Support
from .products import WeightSource


class _SupportLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor | None,
        bias: Tensor | None,
        source: WeightSource,
        support: Support | None,
        scale: float,
    ) -> Tensor:
        ctx.source, ctx.support, ctx.shape, ctx.scale = source, support, x.shape, scale
        ctx.values_dtype = None if values is None else values.dtype
        kept = None
        if support is not None and ctx.needs_input_grad[1]:
            kept = source.product.keep(x, support)
        ctx.save_for_backward(kept)
        return source.product.forward(x, source, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (kept,) = ctx.saved_tensors
        source = ctx.source
        grad_x = grad_values = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = source.read(source.product.input_grad, grad, source, ctx.shape)
        if ctx.needs_input_grad[1]:
            grad_values = source.product.support_grad(grad, kept, ctx.support, source.key).to(ctx.values_dtype)
            if ctx.scale != 1:
                grad_values = grad_values * ctx.scale  # not in place: an observer may have kept it
            source.after_backward()
        if ctx.needs_input_grad[2]:
            grad_bias = source.product.bias_grad(grad)
        return grad_x, grad_values, grad_bias, None, None, None


def support_layer(
    x: Tensor,
    values: Tensor | None,
    bias: Tensor | None,
    source: WeightSource,
    support: Support | None,
    scale: float = 1.0,
) -> Tensor:
    """The layer's output on its effective weight, with gradients for ``x``, ``values`` and ``bias``.

    Args:
        x: the input, of the shape that ``source.product`` takes, in the dtype to compute in.
        values: ``(entries,)`` trained values at ``support``, of which ``source`` adds ``scale * values`` to the
            weight; None for the base weight alone.
        bias: ``(out_features,)`` or None.
        source: of the effective weight, in forward and in backward.
        support: of the values; None without values.
        scale: factor between the values and the delta.

    Returns:
        The output in ``x``'s dtype.
    """
    product = source.product
    return product.leave(_SupportLayer.apply(product.enter(x), values, bias, source, support, scale), x)
