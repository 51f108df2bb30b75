"""The layers as plain tensor operations, for compiled graphs, which must not see writes to the base weight.

The effective entries are *set* in a temporary copy of the weight, so the result does not depend on whether the weight
already contains them. The copy is built again in backward and never saved.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..numerics.tokens import accumulation_dtype, flatten_tokens
from ..support import ChannelSupport, Support
from .conv import ConvProduct
from .embedding import EmbeddingProduct
from .entries import effective_entries
from .products import LayerProduct
from .torch_library import embedding_grad, embedding_rows, support_grad

# In place of a dimension: positions are those of single entries.
ENTRIES = -1


def _effective(weight: Tensor, values: Tensor, positions: Tensor, originals: Tensor, dim: int) -> Tensor:
    """The effective weight, as a new tensor."""
    entries = effective_entries(originals, values)
    if dim == ENTRIES:
        return weight.reshape(-1).scatter(0, positions.long(), entries).view(weight.shape)
    shape = list(weight.shape)
    shape[dim] = positions.shape[0]
    return weight.index_copy(dim, positions.long(), entries.view(shape))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        bias: Tensor | None,
        weight: Tensor,
        positions: Tensor,
        originals: Tensor,
        dim: int,
        in_dim: int,
        key: int,
        row_ptr: Tensor | None,
        cols: Tensor | None,
    ) -> Tensor:
        kept = x.index_select(-1, positions) if dim == in_dim else x
        ctx.save_for_backward(kept, values, weight, positions, originals, row_ptr, cols)
        ctx.dim, ctx.in_dim, ctx.key = dim, in_dim, key
        effective = _effective(weight, values, positions, originals, dim).to(x.dtype)
        return F.linear(x, effective if in_dim == 1 else effective.t(), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, values, weight, positions, originals, row_ptr, cols = ctx.saved_tensors
        grad_x = grad_values = grad_bias = None
        if ctx.needs_input_grad[0]:
            effective = _effective(weight, values, positions, originals, ctx.dim).to(grad.dtype)
            grad_x = F.linear(grad, effective.t() if ctx.in_dim == 1 else effective)
        if ctx.needs_input_grad[1]:
            out = grad.index_select(-1, positions) if ctx.dim == 1 - ctx.in_dim else grad
            left, right = flatten_tokens(out), flatten_tokens(kept)
            if ctx.in_dim == 0:
                left, right = right, left
            if ctx.dim == ENTRIES:
                stored = [positions] if cols is None else [row_ptr, cols]
                grad_values = support_grad(left, right, stored, *weight.shape, ctx.key)
            else:
                dtype = accumulation_dtype(left.dtype)
                grad_values = (left.t().to(dtype) @ right.to(dtype)).reshape(-1)
            grad_values = grad_values.to(values.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = flatten_tokens(grad).sum(0)
        return grad_x, grad_values, grad_bias, *(None,) * 8


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        bias: Tensor | None,
        weight: Tensor,
        positions: Tensor,
        originals: Tensor,
        dim: int,
        product: ConvProduct,
    ) -> Tensor:
        ctx.save_for_backward(x.index_select(1, positions) if dim == 1 else x, values, weight, positions, originals)
        ctx.dim, ctx.product, ctx.shape = dim, product, x.shape
        effective = _effective(weight, values, positions, originals, dim).to(x.dtype)
        return product.convolve(x, effective, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, values, weight, positions, originals = ctx.saved_tensors
        product = ctx.product
        grad_x = grad_values = grad_bias = None
        if ctx.needs_input_grad[0]:
            effective = _effective(weight, values, positions, originals, ctx.dim).to(grad.dtype)
            grad_x = product.dense_input_grad(grad, effective, ctx.shape)
        if ctx.needs_input_grad[1]:
            out = grad.index_select(1, positions) if ctx.dim == 0 else grad
            dense = product.dense_grad(out, kept).reshape(-1)
            grad_values = (dense.index_select(0, positions) if ctx.dim == ENTRIES else dense).to(values.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = product.bias_grad(grad)
        return grad_x, grad_values, grad_bias, *(None,) * 5


def functional_layer(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    weight: Tensor,
    originals: Tensor,
    support: Support,
    product: LayerProduct,
    key: int,
) -> Tensor:
    """``support_layer`` for ``torch.compile``.

    A convolution forms its whole dense weight gradient.

    Args:
        x: as in ``support_layer``.
        values: as in ``support_layer``.
        bias: as in ``support_layer``.
        weight: the base weight.
        originals: ``(entries,)`` entries of the base model at the support.
        support: of the values.
        product: of the layer.
        key: of the layer, for observers.
    """
    row_ptr = cols = None
    if isinstance(support, ChannelSupport):
        positions, dim = support.channels, support.dim
    else:
        positions, dim = support.indices, ENTRIES
        if len(support.stored) == 2:  # else the positions themselves; graphs take no tensor twice
            row_ptr, cols = support.stored
    if isinstance(product, ConvProduct):
        out = _Conv.apply(product.enter(x), values, bias, weight, positions, originals, dim, product)
        return product.leave(out, x)
    return _Linear.apply(x, values, bias, weight, positions, originals, dim, product.in_dim, key, row_ptr, cols)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        ids: Tensor,
        values: Tensor,
        weight: Tensor,
        originals: Tensor,
        product: EmbeddingProduct,
        key: int,
        *stored: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(ids, *stored)
        ctx.product, ctx.key, ctx.dtype = product, key, values.dtype
        return embedding_rows(ids, weight, effective_entries(originals, values), stored)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ids, *stored = ctx.saved_tensors
        product, grad_values = ctx.product, None
        if ctx.needs_input_grad[1]:
            how = product.rows, product.padding, product.by_frequency
            grad_values = embedding_grad(ids, grad, stored, *how, ctx.key).to(ctx.dtype)
        return None, grad_values, *(None,) * (4 + len(stored))


def functional_embedding(
    ids: Tensor,
    values: Tensor,
    weight: Tensor,
    originals: Tensor,
    support: Support,
    product: EmbeddingProduct,
    key: int,
) -> Tensor:
    """An embedding's rows for ``torch.compile``, whose entries are set in the rows that are looked up.

    Args:
        ids: of any shape.
        values: ``(entries,)`` trained delta, differentiable.
        weight: the base weight, which may hold the entries already.
        originals: ``(entries,)`` entries of the base model at the support.
        support: of the values.
        product: of the layer.
        key: of the layer, for observers.
    """
    return _Embedding.apply(ids, values, weight, originals, product, key, *support.stored)
