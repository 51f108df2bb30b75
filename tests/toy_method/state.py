"""The trained state of the toy method: values of a band, and the number of its first diagonal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor

from sparse_peft.ops import Combination
from sparse_peft.support import Support
from sparse_peft.tuners.base_state import TrainedState
from sparse_peft.tuners.delta import UNSET, Delta


def band(shape: tuple[int, int], first: int, width: int, name: str) -> Support:
    """The positions ``(row, (row + first + n) % cols)`` for each row and ``n`` below ``width``."""
    rows, cols = shape
    columns = (torch.arange(rows)[:, None] + first + torch.arange(width)) % cols
    indices = (torch.arange(rows)[:, None] * cols + columns).flatten().sort().values
    return Support(shape, indices, name=name)


class BandDelta(Delta):
    """``values``, in the order of the positions, are added to a band of the weight.

    Args:
        shape: ``(rows, cols)`` of the weight as stored.
        width: number of diagonals.
        name: the layer's name.
        first: the first diagonal; drawn at random if no file brings it.
    """

    position_names = ("first",)

    def __init__(self, shape: tuple[int, int], width: int, name: str, first: int):
        super().__init__(shape, shape[0] * width, name, self._draw)
        self.width, self.drawn = width, first
        self.keep_positions({"first": torch.tensor([UNSET])})

    def _draw(self, weight: Callable[[], Tensor], shape: tuple[int, int]) -> Support:
        return band(shape, self.drawn, self.width, self.name)

    def support_from(self, buffer: Tensor) -> Support:
        return band(self.shape, int(buffer), self.width, self.name).to(buffer.device)

    def file_positions(self, support: Support) -> dict[str, Tensor]:
        columns = support.cols[support.rows == 0].long()
        before = (columns - 1) % self.shape[1]
        (first,) = columns[~torch.isin(before, columns)].tolist() or [0]  # all columns: any is the first
        return {"first": torch.tensor([first])}

    @classmethod
    def combine(cls, states: Sequence[Self], weights: Sequence[float], how: Combination) -> dict[str, Tensor]:
        if not all(states[0].combines_with(state) for state in states):
            raise ValueError(f"layer {states[0].name}: the bands differ; sparse_peft.adapters.compose adds them up")
        return super().combine(states, weights, how)

    def combines_with(self, other: TrainedState) -> bool:
        return isinstance(other, BandDelta) and torch.equal(self.support.indices, other.support.indices)
