"""Reading and writing a weight at a [`Support`][sparse_peft.support.Support] of whatever structure.

Single entries go by their flat positions, with the kernels of ``sparse_peft.ops.entries``; whole channels by their
numbers, as slices. Values come and go in the order of positions. A weight may have more than two dimensions, as a
convolution's: positions are those of its matrix ``(out, everything else)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..support import ChannelSupport, Support
from .entries import effective_entries, read_entries, restore_, resync_, scatter_add_, write_entries_


def _channels_of(weight: Tensor, support: ChannelSupport) -> tuple[int, ...]:
    """The shape of the weight's trained channels."""
    shape = list(weight.shape)
    shape[support.dim] = support.count
    return tuple(shape)


def _sliced(weight: Tensor, support: ChannelSupport) -> bool:
    """Whether the channels are slices of the weight as it is; not of a convolution's that lies flattened."""
    return support.width == 1 or weight.ndim > 2


def _read_channels(weight: Tensor, support: ChannelSupport) -> Tensor:
    if _sliced(weight, support):
        return weight.index_select(support.dim, support.channels).reshape(-1)
    return weight.index_select(1, support.lines).reshape(-1)


def _write_channels_(weight: Tensor, support: ChannelSupport, entries: Tensor) -> None:
    weight, entries = weight.detach(), entries.detach()
    if _sliced(weight, support):
        weight.index_copy_(support.dim, support.channels.long(), entries.view(_channels_of(weight, support)))
    else:
        weight.index_copy_(1, support.lines, entries.view(support.matrix_shape))


def read_support(weight: Tensor, support: Support) -> Tensor:
    """The weight's entries at the support, as a new tensor ``(entries,)`` of the weight's dtype."""
    if isinstance(support, ChannelSupport):
        return _read_channels(weight, support)
    return read_entries(weight, support.indices)


def write_support_(weight: Tensor, support: Support, entries: Tensor) -> None:
    """Overwrite the weight's entries at the support, in place; every other bit stays as it is."""
    if isinstance(support, ChannelSupport):
        _write_channels_(weight, support, entries)
    else:
        write_entries_(weight, support.indices, entries)


def add_to_support_(weight: Tensor, support: Support, values: Tensor) -> None:
    """``weight[support] = round(weight[support] + values)``, in place and rounded once."""
    if isinstance(support, ChannelSupport):
        _write_channels_(weight, support, effective_entries(_read_channels(weight.detach(), support), values.detach()))
    else:
        scatter_add_(weight, support.indices, values)


def _split(
    supports: Sequence[Support], flat: Callable[[list[int]], None], channels: Callable[[int, ChannelSupport], None]
) -> None:
    """Call ``flat`` with the numbers of all supports of entries, and ``channels`` for each of the others."""
    entries = []
    for n, support in enumerate(supports):
        if isinstance(support, ChannelSupport):
            channels(n, support)
        else:
            entries.append(n)
    if entries:
        flat(entries)


@torch.no_grad()
def resync_supports_(
    weights: Sequence[Tensor],
    supports: Sequence[Support],
    originals: Sequence[Tensor],
    values: Sequence[Tensor],
    take: bool,
) -> None:
    """``weight[support] = round(original + value)`` for many weights.

    Args:
        weights: the base weights.
        supports: of each.
        originals: ``(entries,)`` each, in the weight's dtype: the base's own entries.
        values: ``(entries,)`` each: the deltas.
        take: fill ``originals`` from the weights first.
    """

    def flat(some: list[int]) -> None:
        parts = ([each[n] for n in some] for each in (weights, supports, originals, values))
        of, at, own, add = parts
        resync_(of, [support.indices for support in at], own, add, take)

    def channels(n: int, support: ChannelSupport) -> None:
        if take:
            originals[n].copy_(_read_channels(weights[n].detach(), support))
        _write_channels_(weights[n], support, effective_entries(originals[n], values[n]))

    _split(supports, flat, channels)


@torch.no_grad()
def restore_supports_(weights: Sequence[Tensor], supports: Sequence[Support], originals: Sequence[Tensor]) -> None:
    """``weight[support] = original`` for many weights."""

    def flat(some: list[int]) -> None:
        restore_([weights[n] for n in some], [supports[n].indices for n in some], [originals[n] for n in some])

    def channels(n: int, support: ChannelSupport) -> None:
        _write_channels_(weights[n], support, originals[n])

    _split(supports, flat, channels)
