"""Entries that weights hold for a time: many weights are written and restored together, on a GPU in one launch.

A CPU computes the positions of many entries a piece at a time, see [`Support`][sparse_peft.support.Support], and reads
the weight's own entries of a piece right before it writes the others: it then finds them in its cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..support import ChannelSupport, Support
from .backends import forced_backend
from .entries import (
    UNSCALED,
    effective_entries,
    load_piece,
    read_entries,
    read_support,
    restore_,
    resync_,
    take_,
    write_piece_,
    write_support_,
)

# Up to so many entries, positions are kept while a weight holds them: 16 KB a layer at most, and a call of each of the
# operations that would compute them costs more than reading the entries.
FEW_ENTRIES = 2048


@dataclass(slots=True, eq=False)
class HeldEntries:
    """Entries of a weight that others take the place of.

    Attributes:
        weight: the parameter.
        support: the entries' positions.
        place: ``(entries,)`` int64 flat positions, where they are few and the weight is on a CPU.
        known: how many of the weight's own entries were read, from the first on. All later ones are in the weight.
    """

    weight: Tensor
    support: Support
    place: Tensor | None = None
    known: int = 0
    _read: Tensor = field(init=False, repr=False)

    @property
    def originals(self) -> Tensor:
        """``(entries,)`` the weight's own, in its dtype."""
        if self.known < self.support.nnz:
            self.complete()
        return self._read

    def complete(self) -> None:
        """Read those that are still in the weight, as an interrupted ``resync_supports_`` leaves many."""
        found = read_support(self.weight.detach(), self.support)
        found[: self.known] = self._read[: self.known]
        self.keep(found)

    def keep(self, originals: Tensor) -> None:
        """Note the weight's own entries."""
        self._read, self.known = originals, originals.numel()

    def is_like(self, weight: Tensor) -> bool:
        """Whether what is known has the weight's dtype and device."""
        return self._read.dtype == weight.dtype and self._read.device == weight.device

    def read_later(self) -> None:
        """Make room for the weight's own entries."""
        self._read, self.known = self.weight.new_empty(self.support.nnz), 0

    def note(self, first: int, last: int, piece: Tensor) -> Tensor:
        """The weight's own entries at some positions, which are known from now on."""
        if last > self.known:
            read_entries(self.weight.detach(), piece, out=self._read[first:last])
            self.known = last
        else:
            load_piece(self.weight.detach(), piece)
        return self._read[first:last]


def _in_pieces(held: HeldEntries) -> bool:
    return held.weight.is_cpu and forced_backend() is None


@torch.no_grad()
def take_supports_(held: Iterable[HeldEntries]) -> None:
    """Read weights' own entries; many on a CPU are left to ``resync_supports_``."""
    others = []
    for one in held:
        if isinstance(one.support, ChannelSupport):
            one.keep(read_support(one.weight.detach(), one.support))
        elif not _in_pieces(one):
            one.read_later()
            others.append(one)
        elif (place := _place_of(one)) is not None:
            one.place = place
            one.keep(one.weight.view(-1).index_select(0, place))
        else:
            one.read_later()
    if others:
        weights, indices = [one.weight for one in others], [one.support.indices for one in others]
        take_(weights, indices, [one._read for one in others])
        for one in others:
            one.keep(one._read)


def _place_of(held: HeldEntries) -> Tensor | None:
    is_kept = held.support.nnz <= FEW_ENTRIES and held.weight.is_contiguous()
    return held.support.flat_in_one_piece() if is_kept else None


@torch.no_grad()
def resync_supports_(
    held: Sequence[HeldEntries], values: Sequence[Tensor], scales: Iterable[float] = UNSCALED
) -> None:
    """``weight[support] = round(original + scale * value)`` for many weights.

    An original is known before its place in the weight changes, so that an interruption loses none.

    Args:
        held: what ``take_supports_`` was called with.
        values: ``(entries,)`` each.
        scales: factors between the values and the deltas.
    """
    others, deltas = [], []
    for one, value, scale in zip(held, values, scales, strict=False):
        if one.place is not None:
            entries = effective_entries(one.originals, value, scale)
            one.weight.view(-1).index_copy_(0, one.place, entries)
        elif isinstance(one.support, ChannelSupport):
            write_support_(one.weight, one.support, effective_entries(one.originals, value, scale))
        elif _in_pieces(one):
            _resync_pieces_(one, value.detach(), scale)
        else:
            others.append(one)
            deltas.append(value.detach() if scale == 1 else value.detach() * scale)
    if others:
        originals = [one.originals for one in others]
        resync_([one.weight for one in others], [one.support.indices for one in others], originals, deltas)


def _resync_pieces_(held: HeldEntries, values: Tensor, scale: float) -> None:
    if 0 < held.known < held.support.nnz:
        held.complete()  # pieces may have other bounds than those of the call that was interrupted
    weight = held.weight.detach()
    for first, last, piece in held.support.flat_pieces():
        own = held.note(first, last, piece)
        write_piece_(weight, piece, effective_entries(own, values[first:last], scale))


@torch.no_grad()
def restore_supports_(held: Sequence[HeldEntries]) -> None:
    """``weight[support] = original`` for many weights; may be repeated."""
    others = []
    for one in held:
        if one.place is not None:
            one.weight.view(-1).index_copy_(0, one.place, one.originals)
        elif isinstance(one.support, ChannelSupport) or _in_pieces(one):
            write_support_(one.weight, one.support, one.originals)
        else:
            others.append(one)
    if others:
        originals = [one.originals for one in others]
        restore_([one.weight for one in others], [one.support.indices for one in others], originals)
