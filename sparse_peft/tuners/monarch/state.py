"""The trained state of one Monarch adapter in one layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor, nn

from ...ops import Combination, block_sizes, monarch_dense, monarch_factors, monarch_product, monarch_sum
from ..base_state import TrainedState
from ..forms import StateSizes
from .config import MonarchConfig


class MonarchState(TrainedState):
    """A Monarch matrix is added to the weight, seen as a map from inputs to outputs.

    ``A`` is ``(nblocks, blk_r, p)`` and ``B`` ``(nblocks, s, blk_r)``. With ``init="residual"`` the buffers
    ``A_start`` and ``B_start`` have their first values, whose product is subtracted.

    Args:
        sizes: ``(inputs, outputs)`` of the layer.
        config: the adapter's.
        name: the layer's name, for error messages.
        start: the first values of both factors; None for zeros, or where a file brings them.
    """

    value_name = "B"
    position_names = ("A_start", "B_start")
    combinations = ("linear", "cat")
    why_these_combinations = "its delta is given by block-diagonal factors, of which sums alone are exact"

    def __init__(
        self, sizes: tuple[int, int], config: MonarchConfig, name: str, start: tuple[Tensor, Tensor] | None = None
    ):
        super().__init__(name)
        self.inputs, self.outputs = sizes
        self.blocks = config.nblocks, config.blk_r
        width, height = block_sizes(*sizes, config.nblocks)
        shapes = (config.nblocks, config.blk_r, width), (config.nblocks, height, config.blk_r)
        self.A = nn.Parameter(torch.empty(shapes[0]))
        self.B = nn.Parameter(torch.zeros(shapes[1]))
        nn.init.uniform_(self.A, -1 / math.sqrt(width), 1 / math.sqrt(width))  # each block as nn.Linear's
        self.dropout = nn.Dropout(config.dropout) if config.dropout > 0 else nn.Identity()
        self.subtracts = config.init == "residual"
        if self.subtracts:
            found = [torch.zeros(shape) for shape in shapes] if start is None else start
            for parameter, buffer, tensor in zip((self.A, self.B), self.position_names, found, strict=True):
                parameter.data = tensor.to(torch.float32).clone()
                self.register_buffer(buffer, parameter.detach().clone())
        self.keep_dtype()

    def randomise(self) -> None:
        nn.init.normal_(self.B)

    def _parts(self) -> list[tuple[Tensor, Tensor, float]]:
        """``(first, second, sign)`` of the matrices that the delta is the sum of."""
        own = (self.A, self.B, 1.0)
        if not self.subtracts:
            return [own]
        down, up = (self.own_buffers[name].to(self.A.dtype) for name in self.position_names)
        return [own, (down, up, -1.0)]

    def output(self, x: Tensor) -> Tensor:
        """The delta's product with the layer's input; the delta is never formed."""
        x = self.dropout(x)
        products = [monarch_product(x, first, second, self.outputs) for first, second, _ in self._parts()]
        return products[0] - products[1] if self.subtracts else products[0]

    def dense(self) -> Tensor:
        """``(outputs, inputs)``."""
        parts = [monarch_dense(first, second, self.inputs, self.outputs) for first, second, _ in self._parts()]
        return parts[0] - parts[1] if self.subtracts else parts[0]

    def sizes(self, save_dtype: torch.dtype) -> StateSizes:
        nblocks, rank, _ = self.A.shape  # a token has as many numbers between the factors as with this rank
        return replace(super().sizes(save_dtype), rank=nblocks * rank)

    def low_rank_part(self) -> tuple[Tensor, Tensor]:
        factors = [
            (*monarch_factors(first.detach(), second.detach(), self.inputs, self.outputs), sign)
            for first, second, sign in self._parts()
        ]
        return torch.cat([down for down, _, _ in factors]), torch.cat([up * sign for _, up, sign in factors], dim=1)

    def combines_with(self, other: TrainedState) -> bool:
        return isinstance(other, MonarchState) and self.A.shape[0] == other.A.shape[0]

    @classmethod
    def combine(cls, states: Sequence[Self], weights: Sequence[float], how: Combination) -> dict[str, Tensor]:
        if not all(states[0].combines_with(state) for state in states):
            blocks = sorted({state.A.shape[0] for state in states})
            raise ValueError(
                f"layer {states[0].name}: adapters with nblocks of {' and '.join(map(str, blocks))} have no sum of "
                "their form; save them with sparse_peft.adapters.save_as_lora and combine these"
            )
        parts = [
            (first.detach().cpu().double(), second.detach().cpu().double(), weight * sign)
            for state, weight in zip(states, weights, strict=True)
            for first, second, sign in state._parts()
        ]
        first, second = monarch_sum([part[:2] for part in parts], [part[2] for part in parts])
        return {"A": first.float(), "B": second.float()}

    def extra_repr(self) -> str:
        nblocks, rank = self.blocks  # FSDP1's flat parameters have other shapes
        return f"nblocks={nblocks}, blk_r={rank}, inputs={self.inputs}, outputs={self.outputs}"
