"""Singular vectors that train: their product with a layer's input, and the gradients of Sparse Spectral Training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Spectral(torch.autograd.Function):
    """``x V' diag(S) U'``; the gradients of the vectors leave the singular values out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, u: Tensor, s: Tensor, v: Tensor) -> Tensor:
        inner = x @ v.t()
        ctx.save_for_backward(x, inner, u, s, v)
        return (inner * s) @ u.t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, inner, u, s, v = ctx.saved_tensors
        back = grad @ u
        return (
            (back * s) @ v if ctx.needs_input_grad[0] else None,
            grad.t() @ inner if ctx.needs_input_grad[1] else None,
            (back * inner).sum(0) if ctx.needs_input_grad[2] else None,
            back.t() @ x if ctx.needs_input_grad[3] else None,
        )


def spectral_product(x: Tensor, u: Tensor, s: Tensor, v: Tensor) -> Tensor:
    """The product of ``u diag(s) v`` with vectors, whose singular vectors get *enhanced* gradients.

    With the weight's gradient ``G`` these are ``G v'`` and ``u' G`` (SST, section 4.2, https://arxiv.org/abs/2405.15481):
    autograd's divided by the singular values, so that directions of small ones learn, too. Those of ``x`` and ``s``
    are autograd's.

    Args:
        x: ``(..., inputs)``.
        u: ``(outputs, r)``.
        s: ``(r,)``.
        v: ``(r, inputs)``.

    Returns:
        ``(..., outputs)``.

    Example:
        >>> import torch
        >>> from sparse_peft.ops import spectral_product
        >>> spectral_product(torch.ones(3, 8), torch.ones(4, 2), torch.ones(2), torch.ones(2, 8)).shape
        torch.Size([3, 4])
    """
    out: Any = _Spectral.apply(x.reshape(-1, x.shape[-1]), u, s, v)
    return out.reshape(*x.shape[:-1], u.shape[0])
