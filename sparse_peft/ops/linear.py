"""Linear layer whose weight is trained at a support: forward and backward on the *effective* weight.

Only the input is saved for backward. The effective weight is asked for again there, from a ``WeightSource``: a
resident weight costs nothing, an overlay or a dequantised buffer is made anew and dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .entries import effective_entries
from .library import sddmm
from .support_grad import observed_support_grad


class WeightSource(Protocol):
    """Where a step's effective weight comes from.

    ``shape`` is that of the weight as stored, ``in_dim`` the dimension of it that is the input's (1 for ``nn.Linear``,
    0 for GPT-2's ``Conv1D``), ``key`` the layer's for observers.
    """

    shape: tuple[int, int]
    in_dim: int
    key: int

    def panels(self, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
        """``(start, stop, weight[start:stop])`` in ``dtype``, over consecutive rows, together all rows."""
        ...

    def after_backward(self) -> None:
        """Called once the values' gradient was formed."""
        ...


def _product(x: Tensor, source: WeightSource, t: bool, bias: Tensor | None = None) -> Tensor:
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


def _matrix(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


class _SupportLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, values, bias, source, support):
        ctx.source, ctx.support = source, support
        ctx.values_dtype = None if values is None else values.dtype
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None)
        return _product(x, source, source.in_dim == 1, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        source = ctx.source
        grad_x = grad_values = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _product(grad, source, source.in_dim == 0)
        if ctx.needs_input_grad[1]:
            left, right = _matrix(grad), _matrix(x)
            if source.in_dim == 0:
                left, right = right, left
            grad_values = observed_support_grad(left, right, ctx.support, source.key)
            grad_values = grad_values.to(ctx.values_dtype)
            source.after_backward()
        if ctx.needs_input_grad[2]:
            grad_bias = _matrix(grad).sum(0)
        return grad_x, grad_values, grad_bias, None, None


class _FunctionalSupportLinear(torch.autograd.Function):
    """The same layer as ordinary tensor operations, for compiled graphs, which must not see writes to the base."""

    @staticmethod
    def _effective(weight, values, indices, originals):
        entries = effective_entries(originals, values)
        return weight.reshape(-1).scatter(0, indices.long(), entries).view(weight.shape)

    @staticmethod
    def forward(ctx, x, values, bias, weight, indices, originals, row_ptr, cols, in_dim, key):
        ctx.save_for_backward(x, values, weight, indices, originals, row_ptr, cols)
        ctx.in_dim, ctx.key = in_dim, key
        effective = _FunctionalSupportLinear._effective(weight, values, indices, originals).to(x.dtype)
        return F.linear(x, effective if in_dim == 1 else effective.t(), bias)

    @staticmethod
    def backward(ctx, grad):
        x, values, weight, indices, originals, row_ptr, cols = ctx.saved_tensors
        grad_x = grad_values = grad_bias = None
        if ctx.needs_input_grad[0]:
            effective = _FunctionalSupportLinear._effective(weight, values, indices, originals).to(grad.dtype)
            grad_x = F.linear(grad, effective.t() if ctx.in_dim == 1 else effective)
        if ctx.needs_input_grad[1]:
            left, right = _matrix(grad), _matrix(x)
            if ctx.in_dim == 0:
                left, right = right, left
            rows, columns = weight.shape
            grad_values = sddmm(left, right, row_ptr, cols, indices, rows, columns, ctx.key)
            grad_values = grad_values.to(values.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = _matrix(grad).sum(0)
        return grad_x, grad_values, grad_bias, None, None, None, None, None, None, None


def support_linear(x: Tensor, values: Tensor | None, bias: Tensor | None, source: WeightSource, support) -> Tensor:
    """``x @ W_eff.T + bias`` with gradients for ``x``, ``values`` and ``bias``.

    Args:
        x: ``(..., in_features)`` in the dtype to compute in.
        values: ``(entries,)`` trained delta at ``support``, whose effect on the weight is the source's business; None
            for the base weight alone.
        bias: ``(out_features,)`` or None.
        source: gives the effective weight, in forward and again in backward.
        support: the :class:`~sparse_peft.support.Support` of the values.

    Returns:
        ``(..., out_features)`` in ``x``'s dtype.
    """
    return _SupportLinear.apply(x, values, bias, source, support)


def functional_support_linear(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    weight: Tensor,
    indices: Tensor,
    originals: Tensor,
    row_ptr: Tensor,
    cols: Tensor,
    in_dim: int,
    key: int,
) -> Tensor:
    """:func:`support_linear` for ``torch.compile``: no state, no in-place write.

    ``originals`` are the base's entries at ``indices``; the effective entries are *set*, so the result is the same
    whether or not ``weight`` already holds them.
    """
    return _FunctionalSupportLinear.apply(x, values, bias, weight, indices, originals, row_ptr, cols, in_dim, key)
