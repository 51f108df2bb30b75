"""The adapters that act together on one weight."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from ..ops import remember
from ..support import ChannelSupport, ExpertColumns, Shard, Support


@dataclass(frozen=True, eq=False)
class ActiveDelta:
    """The adapters that act together on one weight.

    Attributes:
        names: the adapters, in order.
        parts: their supports.
        support: the union of these, within the part of the weight that this process has.
        own: for each adapter the slots of its entries that lie in this part; None where all do.
        slots: for each adapter the places of its entries in the union; None where it is alone.
        rows: what lies in ranges of the weight's rows, see ``within``.
    """

    names: tuple[str, ...]
    parts: tuple[Support, ...]
    support: Support
    own: tuple[Tensor | None, ...]
    slots: tuple[Tensor | None, ...]
    rows: dict[Shard, ActiveDelta] = field(default_factory=dict, repr=False)

    @classmethod
    def join(cls, supports: Mapping[str, Support], shard: Shard | None = None) -> ActiveDelta:
        """Of adapters' supports ``{name: support}``, in the part of the weight that this process has."""
        names, parts = tuple(supports), tuple(supports.values())
        own, within = cast("tuple[Tensor | None, ...]", (None,) * len(parts)), parts
        if shard is not None:
            within, own = zip(*map(shard.cut, parts), strict=True)
        union, slots = within[0], cast("list[Tensor | None]", [None])
        if len(within) > 1:
            union, slots[:] = within[0].union(*within[1:])
        if isinstance(union, ExpertColumns):
            assert union.indices is not None  # a graph cannot make them
        elif not isinstance(union, ChannelSupport):
            union = union.compact()
        remember(union)
        return cls(names, parts, union, own, tuple(slots))

    def within(self, shard: Shard) -> ActiveDelta:
        """The adapters in a range of the weight's rows, as those of a weight that has these rows alone."""
        if shard not in self.rows:
            self.rows[shard] = ActiveDelta.join(
                {n: part.of_rows(shard.start, shard.stop)[0] for n, part in zip(self.names, self.parts, strict=True)}
            )
        return self.rows[shard]

    def sum_values(self, values: list[Tensor]) -> Tensor:
        """Values at the union, overlaps added: ``(support.nnz,)``, differentiable.

        Args:
            values: of each adapter, its entries in this process's part of the weight.
        """
        if len(values) == 1:
            return values[0]
        dtype = functools.reduce(torch.promote_types, (part.dtype for part in values))
        total = torch.zeros(self.support.nnz, dtype=dtype, device=values[0].device)
        for slots, part in zip(self.slots, values, strict=True):
            assert slots is not None
            # not index_add, which keeps what it adds for backward
            total = total.scatter_add(0, slots, part.to(dtype))
        return total
