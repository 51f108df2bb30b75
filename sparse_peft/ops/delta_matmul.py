"""The product of activations with a sparse delta alone, beside the base layer's own product.

Used where the effective weight cannot be formed: in mixed batches, with quantisation backends that cannot dequantise,
and for base layers with hooks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..numerics.panels import panels
from ..numerics.tokens import accumulation_dtype
from ..support import ChannelSupport, Support
from . import triton_kernels
from .backends import kernel_backend
from .csr import csr_matrix, csr_product
from .gradient_observers import UNOBSERVED
from .support_grad import observed_support_grad

# On a CPU, a sparse matrix times columns takes a third of the time of the transposed product if a tile of tokens fits
# the cache.
TOKEN_TILE = 128


def delta_matmul_add_(out: Tensor, x: Tensor, values: Tensor, row_ptr: Tensor, cols: Tensor) -> None:
    """``out += x @ S.T`` for a sparse matrix S in CSR form; sums in float32 (float64 for float64), rounded once.

    Args:
        out: ``(tokens, rows)``.
        x: ``(tokens, cols)``, ``out``'s dtype.
        values: ``(entries,)`` of S, whose shape is ``(rows, cols)``.
        row_ptr: ``(rows + 1,)`` row pointers.
        cols: ``(entries,)`` column of each entry.
    """
    if 0 in (out.numel(), cols.numel()):
        return
    kernel = kernel_backend("delta_matmul", x.dtype, x.device)
    if kernel == "triton" and out.stride(-1) == 1:
        triton_kernels.kernels("delta_matmul").delta_matmul_add_(
            out, x.contiguous(), values.contiguous(), row_ptr, cols
        )
        return
    dtype = accumulation_dtype(x.dtype)
    shape = (out.shape[1], x.shape[1])
    delta = csr_matrix(row_ptr, cols, values.to(dtype), shape)
    for start, stop in panels(x.shape[0], sum(shape) * dtype.itemsize, TOKEN_TILE):
        part = csr_product(delta, x[start:stop].to(dtype).t())
        out[start:stop] = out[start:stop].to(dtype).add_(part.t())


def _product(x: Tensor, values: Tensor, support: Support, t: bool) -> Tensor:
    """``x @ S.T`` if ``t`` else ``x @ S``, in ``x``'s dtype."""
    if not t:
        support, order = support.transposed
        values = values[order]
    out = x.new_zeros(x.shape[0], support.shape[0])
    delta_matmul_add_(out, x, values, support.row_ptr, support.cols)
    return out


class _DeltaMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, support: Support, t: bool, key: int) -> Tensor:
        ctx.save_for_backward(x if values.requires_grad else None, values)
        ctx.support, ctx.t, ctx.key = support, t, key
        return _product(x, values, support, t)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, values = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = grad_values = None
        if ctx.needs_input_grad[0]:
            grad_x = _product(grad, values, ctx.support, not ctx.t)
        if ctx.needs_input_grad[1]:
            left, right = (grad, x) if ctx.t else (x, grad)
            grad_values = observed_support_grad(left, right, ctx.support, ctx.key).to(values.dtype)
        return grad_x, grad_values, None, None, None


def _channels(x: Tensor, values: Tensor, support: ChannelSupport, in_dim: int) -> Tensor:
    """``delta_matmul`` for whole channels, with ``values`` as their matrix: one dense product."""
    weight = values if in_dim == 1 else values.t()
    if support.dim == in_dim:
        return F.linear(x.index_select(-1, support.channels), weight)
    out = x.new_zeros(*x.shape[:-1], support.size)
    return out.index_copy(-1, support.channels.long(), F.linear(x, weight))


def delta_matmul(x: Tensor, values: Tensor, support: Support, in_dim: int, key: int = UNOBSERVED) -> Tensor:
    """``x @ S.T`` for a weight stored ``(out, in)``, or ``x @ S`` for one stored ``(in, out)``.

    Args:
        x: ``(..., in_features)``.
        values: ``(entries,)``, the delta at ``support``; differentiable.
        support: of the stored weight.
        in_dim: the dimension of input features of the stored weight.
        key: of the layer, for observers of its gradient.

    Returns:
        ``(..., out_features)`` in ``x``'s dtype.
    """
    if isinstance(support, ChannelSupport):
        return _channels(x, values.to(x.dtype).view(support.matrix_shape), support, in_dim)
    flat = x.reshape(-1, x.shape[-1])
    out = _DeltaMatmul.apply(flat, values, support, in_dim == 1, key)
    return out.view(*x.shape[:-1], out.shape[-1])
