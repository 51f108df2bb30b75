"""Several adapters' channel deltas on one batch: one gather and one batched product (S2FT, section 3.4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def add_channel_deltas_(
    result: Tensor,
    x: Tensor,
    weights: Tensor,
    channels: Tensor,
    items: Sequence[Sequence[int]],
    is_input: bool,
) -> None:
    """Add to each item's result what its adapter's trained channels make of its input.

    Adapters with fewer items than the one with most compute some more than once, and drop the copies.

    Args:
        result: ``(batch, ..., out_features)``, contiguous; changed in place.
        x: ``(batch, ..., in_features)``.
        weights: ``(adapters, channels, out_features)`` for input channels, ``(adapters, in_features, channels)`` for
            output channels, in ``x``'s dtype; zero where an adapter has fewer channels.
        channels: ``(adapters, channels)`` int64, any where the weights are zero.
        items: of each adapter the items of the batch that use it, at least one.
        is_input: whether the channels are the input's.
    """
    adapters, most = len(items), max(map(len, items))
    batch = x.shape[0]
    x3, out3 = x.reshape(batch, -1, x.shape[-1]), result.view(batch, -1, result.shape[-1])
    tokens = x3.shape[1]
    padded = [[*some, *(some[:1] * (most - len(some)))] for some in items]
    flat = [item for some in padded for item in some]
    in_order = flat == list(range(batch))
    order = torch.tensor(padded, device=x.device)[:, :, None, None]  # adapters, items, tokens, features
    token = torch.arange(tokens, device=x.device)[None, None, :, None]
    at = channels[:, None, None, :]
    if is_input:
        inputs = x3[order, token, at].view(adapters, most * tokens, -1)
        if in_order:
            out3.view(adapters, most * tokens, -1).baddbmm_(inputs, weights.to(result.dtype))
            return
        delta = torch.bmm(inputs, weights).view(adapters * most, tokens, -1)
    else:
        inputs = x3 if in_order else x3[order[:, :, 0, 0].reshape(-1)]
        delta = torch.bmm(inputs.reshape(adapters, most * tokens, -1), weights)
        delta = delta.view(adapters * most, tokens, -1)
    keep = [n for n in range(len(flat)) if n % most < len(items[n // most])]
    if len(keep) < len(flat):
        delta, flat = delta[keep], [flat[n] for n in keep]
    item = torch.tensor(flat, device=x.device)
    if is_input:
        out3.index_add_(0, item, delta.to(result.dtype))
        return
    owner = torch.tensor([n // most for n in keep], device=x.device)
    at = channels[owner][:, None, :].expand(-1, tokens, -1)
    if in_order:
        out3.scatter_add_(2, at, delta.to(result.dtype))
    else:
        out3.index_put_((item[:, None, None], token[0], at), delta.to(result.dtype), accumulate=True)
