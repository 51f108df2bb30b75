"""Layers whose weight is trained at a support: forward and backward with the *effective* weight.

Only the input, or what it can be restored from, is saved for backward. The effective weight is requested from
a ``WeightSource`` in both passes: a resident weight costs nothing, an overlay or a dequantised buffer is built again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..support import Support, within_lines
from .kept_inputs import Compression, Kept, cast_once, keep_input
from .products import LayerProduct, LinearProduct, WeightSource


class _SupportLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor | None,
        bias: Tensor | None,
        source: WeightSource,
        support: Support | None,
        how: How,
    ) -> Tensor:
        ctx.source, ctx.support, ctx.shape, ctx.x_dtype, ctx.scale = source, support, x.shape, x.dtype, how.scale
        computed = x if how.dtype is None else cast_once(x, how.dtype)
        if support is not None and ctx.needs_input_grad[1]:
            assert values is not None
            ctx.values_dtype = values.dtype
            kept = _kept(x, computed, source.product, support, how)
            ctx.restore = kept.restore
            ctx.save_for_backward(*kept.tensors)
        return source.read(source.product.forward, computed, source, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        source = ctx.source
        grad_x = grad_values = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = source.read(source.product.input_grad, grad, source, ctx.shape)
            grad_x = grad_x.to(ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            kept = ctx.restore(*ctx.saved_tensors)
            grad_values = source.product.support_grad(grad, kept, ctx.support, source.key).to(ctx.values_dtype)
            if ctx.scale != 1:
                grad_values = grad_values * ctx.scale  # not in place: an observer may have kept it
            source.after_backward()
        if ctx.needs_input_grad[2]:
            grad_bias = source.product.bias_grad(grad)
        return grad_x, grad_values, grad_bias, None, None, None


def _kept(x: Tensor, computed: Tensor, product: LayerProduct, support: Support, how: How) -> Kept:
    part = product.keep(computed, support)
    if part is not computed:
        return Kept((part,), _itself)
    narrows = how.narrows and isinstance(product, LinearProduct)
    return keep_input(x, computed, how.compression, within_lines(support, product.in_dim)[0] if narrows else None)


def _itself(kept: Tensor) -> Tensor:
    return kept


class How(NamedTuple):
    """How a layer computes with its values.

    Attributes:
        scale: factor between the values and the delta.
        dtype: to compute in; None for the input's.
        compression: rounding of the input that is kept for the values' gradient.
        narrows: whether only features with entries are kept of it.
    """

    scale: float = 1.0
    dtype: torch.dtype | None = None
    compression: Compression | None = None
    narrows: bool = False


PLAIN = How()


def support_layer(
    x: Tensor,
    values: Tensor | None,
    bias: Tensor | None,
    source: WeightSource,
    support: Support | None,
    how: How | None = None,
) -> Tensor:
    """The layer's output on its effective weight, with gradients for ``x``, ``values`` and ``bias``.

    Args:
        x: the input, of the shape that ``source.product`` takes.
        values: ``(entries,)`` trained values at ``support``, of which ``source`` adds ``scale * values`` to the
            weight; None for the base weight alone.
        bias: ``(out_features,)`` or None, in the dtype to compute in.
        source: of the effective weight, in forward and in backward.
        support: of the values; None without values.
        how: scale, dtype and rounding; by default 1, the input's, and none.

    Returns:
        The output in the dtype that it is computed in.
    """
    product = source.product
    return product.leave(_SupportLayer.apply(product.enter(x), values, bias, source, support, how or PLAIN), x)
