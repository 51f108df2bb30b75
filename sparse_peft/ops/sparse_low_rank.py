"""A linear layer whose weight is low rank plus sparse and never stored: ``W = up @ down + scatter(values)``.

*Composed*: the rows of the weight are computed one panel at a time, in both passes. The backward pass also forms each
panel's gradient. *Factored*: the weight is never formed. The factors multiply one after the other. Source: SLTrain,
section 3.2, https://arxiv.org/abs/2406.02214; the panels are this package's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..numerics.panels import panels
from ..numerics.tokens import flatten_tokens
from ..support import Support
from .crossover import LARGEST, crossover
from .delta_matmul import delta_matmul_add_
from .entries import add_to_support_, read_support
from .gradient_observers import UNOBSERVED, observer_of
from .support_grad import observed_support_grad


def compose_weight(
    up: Tensor, down: Tensor, values: Tensor, support: Support, start: int = 0, stop: int | None = None
) -> Tensor:
    """Rows ``start`` to ``stop`` of ``up @ down + scatter(values)``, in the factors' dtype."""
    stop = support.shape[0] if stop is None else stop
    weight = up[start:stop] @ down
    within, first, last = support.of_rows(start, stop)
    add_to_support_(weight, within, values[first:last])
    return weight


class _ComposedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, down: Tensor, up: Tensor, values: Tensor, bias: Tensor | None, support: Support, key: int
    ) -> Tensor:
        ctx.save_for_backward(x, down, up, values)
        ctx.support, ctx.key = support, key
        rows, cols = support.shape
        tokens = flatten_tokens(x)
        out = x.new_empty(tokens.shape[0], rows)
        for start, stop in panels(rows, cols * x.element_size()):
            torch.mm(tokens, compose_weight(up, down, values, support, start, stop).t(), out=out[:, start:stop])
        if bias is not None:
            out += bias
        return out.view(*x.shape[:-1], rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, down, up, values = ctx.saved_tensors
        support, (rows, cols) = ctx.support, ctx.support.shape
        for_x, for_down, for_up, for_values, for_bias = ctx.needs_input_grad[:5]
        tokens, grad = flatten_tokens(x), flatten_tokens(grad).contiguous()
        grad_x = torch.zeros_like(tokens) if for_x else None
        grad_down = torch.zeros_like(down) if for_down else None
        grad_up = torch.empty_like(up) if for_up else None
        grad_values = torch.empty_like(values) if for_values else None
        observed = for_values and observer_of(ctx.key) is not None
        if observed:
            grad_values = observed_support_grad(grad, tokens, support, ctx.key).to(values.dtype)
        needs_dense = for_down or for_up or (for_values and not observed)
        # the panel and its gradient are alive together
        for start, stop in panels(rows, 2 * cols * x.element_size()):
            part = grad[:, start:stop]
            if grad_x is not None:
                grad_x.addmm_(part, compose_weight(up, down, values, support, start, stop))
            if not needs_dense:
                continue
            dense = part.t() @ tokens
            if grad_down is not None:
                grad_down.addmm_(up[start:stop].t(), dense)
            if grad_up is not None:
                grad_up[start:stop] = dense @ down.t()
            if grad_values is not None and not observed:
                within, first, last = support.of_rows(start, stop)
                grad_values[first:last] = read_support(dense, within)
        grad_x = None if grad_x is None else grad_x.view(x.shape)
        return grad_x, grad_down, grad_up, grad_values, grad.sum(0) if for_bias else None, None, None


class _FactoredLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, down: Tensor, up: Tensor, values: Tensor, bias: Tensor | None, support: Support, key: int
    ) -> Tensor:
        tokens = flatten_tokens(x)
        hidden = tokens @ down.t()
        ctx.save_for_backward(x, hidden, down, up, values)
        ctx.support, ctx.key = support, key
        out = hidden @ up.t() if bias is None else torch.addmm(bias, hidden, up.t())
        delta_matmul_add_(out, tokens, values, support.row_ptr, support.cols)
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, down, up, values = ctx.saved_tensors
        for_x, for_down, for_up, for_values, for_bias = ctx.needs_input_grad[:5]
        tokens, grad = flatten_tokens(x), flatten_tokens(grad).contiguous()
        grad_x = grad_down = grad_values = None
        if for_x or for_down:
            grad_hidden = grad @ up
        if for_x:
            grad_x = grad_hidden @ down
            turned, order = ctx.support.transposed
            delta_matmul_add_(grad_x, grad, values[order], turned.row_ptr, turned.cols)
            grad_x = grad_x.view(x.shape)
        if for_down:
            grad_down = grad_hidden.t() @ tokens
        grad_up = grad.t() @ hidden if for_up else None
        if for_values:
            grad_values = observed_support_grad(grad, tokens, ctx.support, ctx.key).to(values.dtype)
        return grad_x, grad_down, grad_up, grad_values, grad.sum(0) if for_bias else None, None, None


_LINEAR = {"composed": _ComposedLinear, "factored": _FactoredLinear}

# Cost on a CPU of copying an activation to the layout of a sparse product, in multiplications of a dense one: 100 per
# input, output and product fits matrices of 512 to 2,736 rows (benchmarks/results/weightless-cpu.json).
LAYOUT_COST = 100


def cheaper_way(rank: int, support: Support, tokens: int, dtype: torch.dtype, device: torch.device) -> str:
    """The faster way for a training step, ``"composed"`` or ``"factored"``.

    Args:
        rank: of the factors.
        support: of the values.
        tokens: per step.
        dtype: of the activations.
        device: of the activations.
    """
    rows, cols = support.shape
    # at the crossover, a product with these entries takes as long as the dense one
    at_crossover = crossover(device, dtype, LARGEST, support.density).density
    sparse = support.nnz / at_crossover + LAYOUT_COST * (rows + cols)
    factored = 6 * (rank * (rows + cols) + sparse)
    composed = rows * cols * (6 + 8 * rank / max(1, tokens))
    return "factored" if factored < composed else "composed"


def sparse_low_rank_linear(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    values: Tensor,
    bias: Tensor | None,
    support: Support,
    key: int = UNOBSERVED,
    way: str = "composed",
) -> Tensor:
    """``x @ (up @ down + scatter(values)).T + bias`` without temporaries larger than a panel.

    Args:
        x: ``(..., in_features)``; all floats have its dtype.
        down: ``(rank, in_features)``.
        up: ``(out_features, rank)``.
        values: ``(entries,)`` at ``support``.
        bias: ``(out_features,)`` or None.
        support: of the weight ``(out_features, in_features)``.
        key: of the layer, for observers of its gradient.
        way: ``"composed"`` or ``"factored"``; the same result up to rounding.

    Returns:
        ``(..., out_features)``.
    """
    return _LINEAR[way].apply(x, down, up, values, bias, support, key)
