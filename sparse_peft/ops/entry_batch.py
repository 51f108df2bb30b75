"""Several adapters' entries on one batch: one product with the sparse matrix that has their deltas on its diagonal."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from ..support import Support
from .channel_batch import BatchOrder
from .csr import csr_matrix, csr_product
from .delta_matmul import TOKEN_TILE
from .support_grad import accumulation_dtype


def diagonal_of(supports: Sequence[Support], values: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The deltas as the diagonal blocks of one CSR matrix ``(adapters * rows, adapters * cols)``.

    Args:
        supports: of each adapter, over the same weight.
        values: ``(entries,)`` of each.
        dtype: of what the product is to be with; the matrix has the dtype that sums are taken in.
    """
    rows, cols = supports[0].shape
    ends = torch.cat([support.row_ptr[1:] for support in supports]).view(len(supports), -1).long()
    *starts, entries = accumulate((support.nnz for support in supports), initial=0)
    starts = torch.tensor(starts, device=ends.device)
    row_ptr = torch.cat([starts[:1], (ends + starts[:, None]).flatten()])
    shifted = torch.cat([support.cols.long() + n * cols for n, support in enumerate(supports)])
    index = torch.int32 if entries < 2**31 and len(supports) * cols < 2**31 else torch.int64
    size = len(supports) * rows, len(supports) * cols
    return csr_matrix(
        row_ptr.to(index), shifted.to(index), torch.cat(list(values)).to(accumulation_dtype(dtype)), size
    )


def suits_one_product(order: BatchOrder, tokens: int) -> bool:
    """Whether one product is the cheaper way: with many tokens each adapter fills the processor by itself."""
    return order.places * tokens <= TOKEN_TILE


def add_entry_deltas_(result: Tensor, x: Tensor, diagonal: Tensor, order: BatchOrder) -> None:
    """Add to each item's result what its adapter's entries make of its input.

    Args:
        result: ``(batch, ..., out_features)``, contiguous; changed in place.
        x: ``(batch, ..., in_features)``.
        diagonal: from ``diagonal_of``, of deltas of the shape ``(out_features, in_features)``.
        order: which adapter each item uses.
    """
    out = result.view(result.shape[0], -1, result.shape[-1])
    x = x.reshape(x.shape[0], -1, x.shape[-1])
    tokens = x.shape[1]
    rows = order.arranged(x).reshape(order.adapters, order.places * tokens, -1).transpose(1, 2)
    product = csr_product(diagonal, rows.reshape(-1, order.places * tokens).to(diagonal.dtype))
    delta = product.view(order.adapters, -1, order.places * tokens).transpose(1, 2)
    delta = order.counted(delta.reshape(order.adapters * order.places, tokens, -1))
    if order.items is None:
        out.add_(delta)
    else:
        out.index_add_(0, order.of_kept, delta.to(out.dtype))
