"""Several adapters' channel deltas on one batch: one gather and one batched product (what S2FT calls parallelism)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class BatchOrder:
    """Which adapter each item of a batch uses, arranged for a batched product over the adapters.

    Every adapter gets as many places as the one with most items; places left over repeat an item, and what is computed
    there is dropped.

    Attributes:
        adapters: number of adapters that are used.
        places: of each adapter.
        items: ``(adapters * places,)`` int64 item of each place; None where that is the batch as it is.
        kept: ``(items that use an adapter,)`` int64 places that count; None for all.
        of_kept: ``(items that use an adapter,)`` int64 item of each of these.
    """

    adapters: int
    places: int
    items: Tensor | None
    kept: Tensor | None
    of_kept: Tensor

    @classmethod
    @lru_cache(maxsize=64)
    def of(cls, users: tuple[int, ...], adapters: int, device: torch.device) -> BatchOrder:
        """``users`` has each item's adapter, numbered in order of appearance, or -1."""
        items = [[item for item, user in enumerate(users) if user == adapter] for adapter in range(adapters)]
        places = max(map(len, items))
        padded = [item for some in items for item in [*some, *(some[:1] * (places - len(some)))]]
        kept = [place for place in range(len(padded)) if place % places < len(items[place // places])]
        everything = len(kept) == len(padded)

        def tensor(numbers: list[int]) -> Tensor:
            return torch.tensor(numbers, dtype=torch.int64, device=device)

        return cls(
            adapters,
            places,
            None if padded == list(range(len(users))) else tensor(padded),
            None if everything else tensor(kept),
            tensor([padded[place] for place in kept]),
        )

    def arranged(self, x: Tensor) -> Tensor:
        """The items ``(batch, ...)`` in their places, ``(adapters * places, ...)``."""
        return x if self.items is None else x.index_select(0, self.items)

    def counted(self, placed: Tensor) -> Tensor:
        """Of what is in the places, ``(adapters * places, ...)``, what counts: that of the items ``of_kept``."""
        return placed if self.kept is None else placed.index_select(0, self.kept)


def add_channel_deltas_(
    result: Tensor, x: Tensor, weights: Tensor, channels: Tensor, order: BatchOrder, is_input: bool
) -> None:
    """Add to each item's result what its adapter's trained channels make of its input.

    Args:
        result: ``(batch, ..., out_features)``, contiguous; changed in place.
        x: ``(batch, ..., in_features)``.
        weights: ``(adapters, channels, out_features)`` for input channels, ``(adapters, in_features, channels)`` for
            output channels, in ``x``'s dtype; zero where an adapter has fewer channels.
        channels: ``(adapters, channels)`` int64, any where the weights are zero.
        order: which adapter each item uses.
        is_input: whether the channels are the input's.
    """
    x = x.reshape(x.shape[0], -1, x.shape[-1])
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
    delta, at = order.counted(delta), order.counted(at)
    if is_input:
        out.index_add_(0, order.of_kept, delta)
    elif in_order:
        out.scatter_add_(2, at, delta)
    else:
        token = torch.arange(tokens, device=x.device)[:, None]
        out.index_put_((order.of_kept[:, None, None], token, at), delta, accumulate=True)
