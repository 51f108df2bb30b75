"""The adapters that act together on one weight."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from ..ops import remember
from ..support import ChannelSupport, ExpertColumns, Support


@dataclass(frozen=True, eq=False)
class ActiveDelta:
    """The adapters that act together on one weight.

    Attributes:
        names: the adapters, in order.
        parts: their supports.
        support: the union of these.
        slots: for each adapter the places of its entries in the union; None where it is alone.
    """

    names: tuple[str, ...]
    parts: tuple[Support, ...]
    support: Support
    slots: tuple[Tensor | None, ...]

    @classmethod
    def join(cls, supports: Mapping[str, Support]) -> ActiveDelta:
        """Of adapters' supports ``{name: support}``."""
        names, parts = tuple(supports), tuple(supports.values())
        union, slots = parts[0], cast("list[Tensor | None]", [None])
        if len(parts) > 1:
            union, slots[:] = parts[0].union(*parts[1:])
        if not isinstance(union, ChannelSupport | ExpertColumns):
            union = union.compact()
            remember(union)
        return cls(names, parts, union, tuple(slots))

    def sum_values(self, values: list[Tensor]) -> Tensor:
        """Values at the union, overlaps added: ``(support.nnz,)``, differentiable."""
        if len(values) == 1:
            return values[0]
        dtype = functools.reduce(torch.promote_types, (part.dtype for part in values))
        total = torch.zeros(self.support.nnz, dtype=dtype, device=values[0].device)
        for slots, part in zip(self.slots, values, strict=True):
            assert slots is not None
            # not index_add, which keeps what it adds for backward
            total = total.scatter_add(0, slots, part.to(dtype))
        return total
