"""Product of activations with a sparse delta alone: the path that leaves the base layer's own product untouched.

Used where the effective weight cannot be formed (mixed batches, quantisation backends that cannot dequantise, base
layers with hooks of their own).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .csr import csr_matrix
from .observe import UNOBSERVED
from .panels import panels
from .support_grad import accumulation_dtype, observed_support_grad


def _matmul(x: Tensor, values: Tensor, row_ptr: Tensor, cols: Tensor, shape: tuple[int, int], t: bool) -> Tensor:
    """``x @ S.T`` if ``t`` else ``x @ S``, with S the ``(rows, cols)`` CSR matrix; float32 sums, ``x``'s dtype out."""
    dtype = accumulation_dtype(x.dtype)
    delta = csr_matrix(row_ptr, cols, values.to(dtype), shape)
    if t:
        delta = delta.t()
    out = x.new_empty(x.shape[0], shape[0] if t else shape[1])
    for start, stop in panels(x.shape[0], sum(shape) * dtype.itemsize):
        out[start:stop] = x[start:stop].to(dtype) @ delta
    return out


class _DeltaMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, values, support, t, key):
        ctx.save_for_backward(x if values.requires_grad else None, values)
        ctx.support, ctx.t, ctx.key = support, t, key
        return _matmul(x, values, support.row_ptr, support.cols, support.shape, t)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, values = ctx.saved_tensors
        s = ctx.support
        grad = grad.contiguous()
        grad_x = grad_values = None
        if ctx.needs_input_grad[0]:
            grad_x = _matmul(grad, values, s.row_ptr, s.cols, s.shape, not ctx.t)
        if ctx.needs_input_grad[1]:
            left, right = (grad, x) if ctx.t else (x, grad)
            grad_values = observed_support_grad(left, right, s.row_ptr, s.cols, s.indices, s.shape, ctx.key)
            grad_values = grad_values.to(values.dtype)
        return grad_x, grad_values, None, None, None


def delta_matmul(x: Tensor, values: Tensor, support, in_dim: int, key: int = UNOBSERVED) -> Tensor:
    """``x @ S.T`` for a weight stored ``(out, in)`` (``in_dim=1``), ``x @ S`` for one stored ``(in, out)`` (``0``).

    Args:
        x: ``(..., in_features)``.
        values: ``(entries,)``, the delta at ``support``; differentiable.
        support: the :class:`~sparse_peft.support.Support` of the stored weight.
        in_dim: which dimension of the stored weight is the input's.
        key: of the layer, for observers of its gradient.

    Returns:
        ``(..., out_features)`` in ``x``'s dtype.
    """
    flat = x.reshape(-1, x.shape[-1])
    out = _DeltaMatmul.apply(flat, values, support, in_dim == 1, key)
    return out.view(*x.shape[:-1], out.shape[-1])
