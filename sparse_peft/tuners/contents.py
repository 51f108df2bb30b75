"""What an adapter has in one layer, taken out of its state and put into another one's place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from .delta import Delta


@dataclass(frozen=True, eq=False)
class Contents:
    """The contents of a sparse delta.

    Attributes:
        values: ``(entries,)``, a copy.
        positions: ``{buffer name: tensor}``; these tensors are replaced, never written to.
        scale: factor between values and delta.
    """

    values: Tensor
    positions: Mapping[str, Tensor]
    scale: float

    @classmethod
    def of(cls, delta: Delta) -> Contents:
        """What a delta has now, with its positions known."""
        delta.known_support()  # positions that lie as in a file become flat
        buffers = delta.own_buffers
        positions = {name: buffers[name] for name in delta.position_names if name in buffers}
        return cls(delta.values.detach().clone(), positions, delta.value_scale)

    def put_into(self, delta: Delta) -> None:
        """Make a delta have these contents; may be repeated.

        The parameter stays the same object, at the same address, where the number of entries does.
        """
        values = self.values.to(delta.values)
        if delta.values.shape == values.shape:
            delta.values.detach().copy_(values)
            delta.values.grad = None
        else:
            delta.values = nn.Parameter(values.clone(), requires_grad=delta.values.requires_grad)
        delta.keep_positions(dict(self.positions))
        delta.value_scale = self.scale


def pad_(delta: Delta, entries: int) -> None:
    """Give a delta further entries of value 0, at the lowest positions that are free; in place.

    Args:
        delta: with its positions known.
        entries: number of entries afterwards, not less than there are.
    """
    support = delta.support
    if support.nnz == entries:
        return
    union, (slots, _) = support.union(support.free(entries - support.nnz))
    values = delta.values.new_zeros(entries).scatter_(0, slots, delta.values.detach())
    delta.values = nn.Parameter(values, requires_grad=delta.values.requires_grad)
    delta.keep_support(union)
