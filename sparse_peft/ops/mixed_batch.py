"""Deltas of several adapters on one batch, in a single product for all of them.

Whole channels are gathered and multiplied in one batched product, which S2FT calls parallelism. Single entries
are multiplied as one sparse matrix with the adapters' deltas on its diagonal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from ..numerics.tokens import accumulation_dtype
from ..support import Support
from .csr import csr_matrix, csr_product
from .delta_matmul import TOKEN_TILE


@dataclass(frozen=True)
class BatchOrder:
    """Which adapter each item of a batch uses, arranged for a batched product over the adapters.

    Batches are padded to the busiest adapter: each adapter gets the same number of places. Padding repeats an item,
    and its results are discarded.

    Attributes:
        adapters: number of adapters that are used.
        places: number of places per adapter.
        items: ``(adapters * places,)`` int64 item in each place; None where the batch has this order already.
        kept: ``(items with an adapter,)`` int64 places that are not padding; None for all.
        of_kept: ``(items with an adapter,)`` int64 item in each of these places.
    """

    adapters: int
    places: int
    items: Tensor | None
    kept: Tensor | None
    of_kept: Tensor

    @classmethod
    @lru_cache(maxsize=64)
    def of(cls, users: tuple[int, ...], adapters: int, device: torch.device) -> BatchOrder:
        """The order of a batch.

        Args:
            users: each item's adapter, numbered in order of appearance, or -1 for none.
            adapters: number of adapters.
            device: of the index tensors.
        """
        items = [[item for item, user in enumerate(users) if user == adapter] for adapter in range(adapters)]
        places = max(map(len, items))
        padded = [item for some in items for item in [*some, *(some[:1] * (places - len(some)))]]
        kept = [place for place in range(len(padded)) if place % places < len(items[place // places])]

        def tensor(numbers: list[int]) -> Tensor:
            return torch.tensor(numbers, dtype=torch.int64, device=device)

        return cls(
            adapters,
            places,
            None if padded == list(range(len(users))) else tensor(padded),
            None if len(kept) == len(padded) else tensor(kept),
            tensor([padded[place] for place in kept]),
        )

    def arranged(self, x: Tensor) -> Tensor:
        """Items ``(batch, ...)`` in their places: ``(adapters * places, ...)``."""
        return x if self.items is None else x.index_select(0, self.items)

    def without_padding(self, placed: Tensor) -> Tensor:
        """``(adapters * places, ...)`` reduced to the items ``of_kept``."""
        return placed if self.kept is None else placed.index_select(0, self.kept)


def _as_tokens(x: Tensor) -> Tensor:
    """``(batch, ..., features)`` as ``(batch, tokens, features)``."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


# ------------------------------------------------------------------------------------------------------ whole channels


def add_channel_deltas_(
    result: Tensor, x: Tensor, weights: Tensor, channels: Tensor, order: BatchOrder, is_input: bool
) -> None:
    """Add the output of each item's adapter, whose delta is of whole channels.

    Args:
        result: ``(batch, ..., out_features)``, contiguous; changed in place.
        x: ``(batch, ..., in_features)``.
        weights: ``(adapters, channels, out_features)`` for input channels, ``(adapters, in_features, channels)`` for
            output channels, in ``x``'s dtype; zero where an adapter has fewer channels.
        channels: ``(adapters, channels)`` int64; arbitrary where the weights are zero.
        order: which adapter each item uses.
        is_input: whether the channels are input channels.
    """
    x = _as_tokens(x)
    out = result.view(result.shape[0], -1, result.shape[-1])
    tokens, in_order = x.shape[1], order.items is None
    rows = order.arranged(x)
    at = channels.repeat_interleave(order.places, 0) if order.places > 1 else channels
    at = at[:, None, :].expand(-1, tokens, -1)
    if is_input:
        rows = rows.gather(2, at)
    rows = rows.reshape(order.adapters, order.places * tokens, -1)
    weights = weights.to(rows.dtype)
    if is_input and in_order and result.dtype == rows.dtype:
        out.view(order.adapters, order.places * tokens, -1).baddbmm_(rows, weights)
        return
    delta = torch.bmm(rows, weights).view(order.adapters * order.places, tokens, -1).to(result.dtype)
    delta, at = order.without_padding(delta), order.without_padding(at)
    if is_input:
        out.index_add_(0, order.of_kept, delta)
    elif in_order:
        out.scatter_add_(2, at, delta)
    else:
        token = torch.arange(tokens, device=x.device)[:, None]
        out.index_put_((order.of_kept[:, None, None], token, at), delta, accumulate=True)


# ------------------------------------------------------------------------------------------------------ single entries


def diagonal_of(supports: Sequence[Support], values: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The deltas as the diagonal blocks of one CSR matrix ``(adapters * rows, adapters * cols)``.

    Args:
        supports: of each adapter, over the same weight.
        values: ``(entries,)`` of each.
        dtype: of the activations; the matrix has the dtype that their sums are taken in.
    """
    rows, cols = supports[0].shape
    ends = torch.cat([support.row_ptr[1:] for support in supports]).view(len(supports), -1).long()
    *starts, entries = accumulate((support.nnz for support in supports), initial=0)
    offsets = torch.tensor(starts, device=ends.device)
    row_ptr = torch.cat([offsets[:1], (ends + offsets[:, None]).flatten()])
    shifted = torch.cat([support.cols.long() + n * cols for n, support in enumerate(supports)])
    index = torch.int32 if entries < 2**31 and len(supports) * cols < 2**31 else torch.int64
    size = len(supports) * rows, len(supports) * cols
    return csr_matrix(
        row_ptr.to(index), shifted.to(index), torch.cat(list(values)).to(accumulation_dtype(dtype)), size
    )


def suits_one_product(order: BatchOrder, tokens: int) -> bool:
    """Whether one product is faster: with many tokens, each adapter's own product fills the processor.

    Args:
        order: which adapter each item uses.
        tokens: of an item.
    """
    return order.places * tokens <= TOKEN_TILE


def add_entry_deltas_(result: Tensor, x: Tensor, diagonal: Tensor, order: BatchOrder) -> None:
    """Add the output of each item's adapter, whose delta is of single entries.

    Args:
        result: ``(batch, ..., out_features)``, contiguous; changed in place.
        x: ``(batch, ..., in_features)``.
        diagonal: from ``diagonal_of``, of deltas of shape ``(out_features, in_features)``.
        order: which adapter each item uses.
    """
    out = result.view(result.shape[0], -1, result.shape[-1])
    x = _as_tokens(x)
    tokens = x.shape[1]
    rows = order.arranged(x).reshape(order.adapters, order.places * tokens, -1).transpose(1, 2)
    product = csr_product(diagonal, rows.reshape(-1, order.places * tokens).to(diagonal.dtype))
    delta = product.view(order.adapters, -1, order.places * tokens).transpose(1, 2)
    delta = order.without_padding(delta.reshape(order.adapters * order.places, tokens, -1))
    if order.items is None:
        out.add_(delta)
    else:
        out.index_add_(0, order.of_kept, delta.to(out.dtype))
