"""The product of an embedding: rows of its weight ``(rows, cols)``, looked up by ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..numerics.panels import panels
from ..numerics.tokens import accumulation_dtype, flatten_tokens
from ..support import Support
from .gradient_observers import UNOBSERVED
from .one_hot import OneHot, entries_of_rows
from .products import WeightPanels
from .support_grad import observed_support_grad


@dataclass(frozen=True)
class EmbeddingProduct:
    """Rows of the weight by ids. As a linear layer, it has one-hot inputs and a weight stored ``(in, out)``.

    Attributes:
        rows: number of the weight's rows.
        padding: the id whose row gets no gradient; -1 for none.
        by_frequency: whether a row's gradient is divided by the number of its occurrences.
    """

    rows: int
    padding: int = -1
    by_frequency: bool = False
    in_dim: ClassVar[int] = 0

    @classmethod
    def of(cls, module: nn.Embedding) -> EmbeddingProduct:
        """The product of an embedding."""
        padding = -1 if module.padding_idx is None else module.padding_idx
        return cls(module.num_embeddings, padding, module.scale_grad_by_freq)

    def enter(self, x: Tensor) -> Tensor:
        return x

    def leave(self, out: Tensor, x: Tensor) -> Tensor:
        return out

    def forward(self, x: Tensor, source: WeightPanels, bias: Tensor | None) -> Tensor:
        out: Tensor | None = None
        for start, stop, weight in source.panels(source.dtype):
            if stop - start == self.rows:
                return F.embedding(x, weight)
            if out is None:
                out = weight.new_zeros(*x.shape, weight.shape[1])
            inside = (x >= start) & (x < stop)
            out[inside] = F.embedding(x[inside] - start, weight)
        if out is None:
            raise ValueError(f"the source of a weight of {self.rows} rows returned no panels")
        return out

    def input_grad(self, grad: Tensor, source: WeightPanels, shape: torch.Size) -> Tensor:
        raise TypeError("ids have no gradient")

    def keep(self, x: Tensor, support: Support) -> Tensor:
        return x

    def support_grad(self, grad: Tensor, kept: Tensor, support: Support, key: int) -> Tensor:
        return observed_support_grad(*self.factors(kept, grad), support, key)

    def factors(self, ids: Tensor, grad: Tensor) -> tuple[OneHot, Tensor]:
        """The factors of the weight's gradient, from ids of any shape and the gradient of their rows."""
        flat, rows = ids.reshape(-1).long(), flatten_tokens(grad)
        if self.by_frequency:
            _, place, counts = flat.unique(return_inverse=True, return_counts=True)
            rows = rows.to(accumulation_dtype(rows.dtype)) / counts.index_select(0, place).unsqueeze(1)
        flat = flat if self.padding < 0 else flat.masked_fill(flat == self.padding, -1)
        return OneHot(flat, self.rows), rows

    def bias_grad(self, grad: Tensor) -> Tensor:
        raise TypeError("embeddings have no bias")

    def multiply(self, x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.embedding(x, matrix.t())


def set_row_entries_(rows: Tensor, ids: Tensor, entries: Tensor, support: Support) -> None:
    """Overwrite the entries of a sparse matrix in rows that were looked up; in place.

    Args:
        rows: ``(tokens, cols)``, contiguous.
        ids: ``(tokens,)`` int64, the rows' numbers in the matrix.
        entries: ``(entries,)`` of the matrix, in the dtype of ``rows``.
        support: of the matrix.
    """
    first, last = support.ranges_of_rows(ids)
    longest = int((last - first).max()) if ids.numel() else 0
    for start, stop in panels(ids.numel(), max(1, longest) * 4 * torch.int64.itemsize):
        found, place = entries_of_rows(support, ids[start:stop])
        at = place * rows.shape[1] + support.cols_of(found)
        rows[start:stop].view(-1).scatter_(0, at, entries.index_select(0, found))


class _Delta(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, values: Tensor, support: Support, product: EmbeddingProduct, key: int
    ) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.support, ctx.product, ctx.key, ctx.dtype = support, product, key, values.dtype
        rows = values.new_zeros(ids.numel(), support.shape[1])
        set_row_entries_(rows, ids.reshape(-1).long(), values, support)
        return rows.view(*ids.shape, support.shape[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        return None, ctx.product.support_grad(grad, ids, ctx.support, ctx.key).to(ctx.dtype), None, None, None


def embedding_delta(
    ids: Tensor, values: Tensor, support: Support, product: EmbeddingProduct, key: int = UNOBSERVED
) -> Tensor:
    """Rows of a sparse delta, looked up by ids.

    Args:
        ids: of any shape.
        values: ``(entries,)``, the delta at ``support``; differentiable.
        support: of the embedding's weight.
        product: of the embedding.
        key: of the layer, for observers of its gradient.

    Returns:
        ``(*ids.shape, cols)`` in the values' dtype.
    """
    return _Delta.apply(ids, values, support, product, key)
