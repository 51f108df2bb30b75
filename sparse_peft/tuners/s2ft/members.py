"""Structures of channels, and the layers that have them."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ...calibrate import Side


@dataclass(frozen=True)
class Member:
    """One layer's part in a structure.

    Attributes:
        name: the layer's.
        side: its channels.
        units: ``(units, channels of a unit)`` int64.
    """

    name: str
    side: Side
    units: Tensor


@dataclass(frozen=True)
class Structure:
    """Layers that train the same units.

    Attributes:
        name: of the block, or of the layer where it is alone.
        members: its layers.
        kind: structures of one kind have equal sizes and compete for a global budget.
    """

    name: str
    members: tuple[Member, ...]
    kind: tuple = field(default=(), compare=False)

    @property
    def size(self) -> int:
        """Number of units."""
        return self.members[0].units.shape[0]

    @property
    def cost(self) -> int:
        """Parameters of a unit."""
        return sum(member.units.shape[1] * member.side.cost for member in self.members)

    @property
    def width(self) -> int:
        """Channels of a unit, in the layer where it has most."""
        return max(member.units.shape[1] for member in self.members)

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """``{layer name: (rows, cols)}`` of the layers' weights, or of the one expert's whose channels these are."""
        return {member.name: member.side.part.shape for member in self.members}
