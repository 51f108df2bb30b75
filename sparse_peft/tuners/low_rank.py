"""A product of two thin matrices beside the base weight: what SoRA and SLTrain have of LoRA."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..ops import FACTOR_COMBINATIONS
from .trained import TrainedState
from .tuner_layer import TunerLayer

ALWAYS_POSSIBLE = 64


class LowRankState(TrainedState):
    """``scale * B @ A`` is added to the weight, seen as a map from inputs to outputs.

    ``A`` is ``(rank, inputs)`` and drawn as LoRA's (Kaiming's uniform distribution), ``B`` is ``(outputs, rank)`` and
    starts as zeros.
    """

    combinations: ClassVar[tuple[str, ...]] = FACTOR_COMBINATIONS
    why_these_combinations = (
        "its delta is given by low-rank factors, which have no single entries to prune or to elect signs of; 'linear' "
        "is exact, 'svd' the best approximation of a rank"
    )
    A: nn.Parameter
    B: nn.Parameter
    scale: float
    dropout: nn.Module

    def add_factors(self, sizes: tuple[int, int], rank: int, scale: float, dropout: float) -> None:
        """Make the factors.

        Args:
            sizes: ``(inputs, outputs)``; a convolution's inputs are its input channels times its taps.
            rank: theirs.
            scale: of their product.
            dropout: probability with which an input of the product is left out in training.
        """
        inputs, outputs = sizes
        self.scale = scale
        self.A = nn.Parameter(torch.empty(rank, inputs))
        self.B = nn.Parameter(torch.zeros(outputs, rank))
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        if rank:
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def factors(self) -> tuple[Tensor, Tensor]:
        """``(rank, inputs)`` and ``(outputs, rank)``, whose product is the delta; differentiable."""
        return self.A, self.B * self.scale


class LowRankLayer(TunerLayer):
    """A layer whose adapters have such a product."""

    def low_rank_output(self, x: Tensor, adapter_name: str) -> Tensor:
        """What the product of one adapter makes of the layer's input; it is never formed."""
        state: LowRankState = self.deltas[adapter_name]
        down, up = state.factors()
        x = self._cast_input_dtype(x, down.dtype)
        return self.product.low_rank(state.dropout(x), down, up)

    def low_rank_weight(self, adapter_name: str) -> Tensor:
        """The product itself, as the base weight is stored, in the factors' dtype."""
        down, up = self.deltas[adapter_name].factors()
        weight = up @ down
        return (weight if self.product.in_dim == 1 else weight.t()).reshape(self.weight_shape)


def factor_sizes(shape: tuple[int, int], in_dim: int) -> tuple[int, int]:
    """``(inputs, outputs)`` of a weight stored in this shape."""
    return shape[in_dim], shape[1 - in_dim]


def check_rank(name: str, rank: int, shape: tuple[int, int], field: str) -> None:
    """Refuse ranks that no product of the weight's shape can have; small ones are let pass on layers of any size.

    Raises:
        ValueError: names the field, the layer and the most that is possible.
    """
    most = max(ALWAYS_POSSIBLE, min(shape))
    if not 0 <= rank <= most:
        raise ValueError(
            f"{field}: a rank of {rank} for layer {name} of {shape[0]} x {shape[1]} weights; 0 to {most} are possible"
        )
