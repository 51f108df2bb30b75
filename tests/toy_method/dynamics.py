"""The toy method in training: bands move by one diagonal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from sparse_peft.dynamics.optimizer_state import remap_
from sparse_peft.dynamics.protocol import Dynamics
from sparse_peft.dynamics.records import Record

from .config import BandConfig
from .model import BandLinear
from .state import band


@dataclass(frozen=True)
class Move(Record, event="toy_move"):
    """All bands moved.

    Attributes:
        moves: how often, so far.
        layers: ``{layer name: number of its first diagonal}``.
    """

    plot_name: ClassVar[str | None] = "moves.png"

    moves: int
    layers: dict[str, int]


class BandDynamics(Dynamics[BandConfig, BandLinear]):
    """Moves the bands to the right; values that stay in the band are kept."""

    moves = 0

    @torch.no_grad()
    def after_step(self, step: int) -> Move | None:
        if step % self.config.move_every:
            return None
        self.moves += 1
        return Move(step, self.adapter, self.moves, {name: self._move(layer) for name, layer in self.layers.items()})

    def _move(self, layer: BandLinear) -> int:
        layer.release()
        delta = layer.settled(self.adapter)
        old, first = delta.support, (int(delta.first) + 1) % delta.shape[1]
        new = band(delta.shape, first, delta.width, delta.name)
        kept = old.contains(new.indices)
        source = torch.full((new.nnz,), -1).masked_scatter_(kept, old.slots(new.indices[kept]))
        delta.values.copy_(torch.where(kept, delta.values[source.clamp(min=0)], 0))
        remap_(self.optimizer, delta.values, source, old_size=old.nnz)
        delta.support = new
        layer.rejoin()
        return first

    def state_dict(self) -> dict[str, Any]:
        return {"moves": self.moves}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.moves = state["moves"]
