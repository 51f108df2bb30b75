"""A product of two thin matrices beside the base weight: what SoRA and SLTrain have of LoRA."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..ops import FACTOR_COMBINATIONS, Combination, MatrixProduct, combine_factors
from .base_config import BaseSparseConfig
from .base_layer import TunerLayer
from .base_state import TrainedState
from .forms import StateSizes, layer_of_factors
from .targets import Targets, check_shapes, stored_shape

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
            rank: of both factors.
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

    def low_rank_part(self) -> tuple[Tensor, Tensor]:
        down, up = self.factors()
        return down.detach(), up.detach()

    def sizes(self, save_dtype: torch.dtype) -> StateSizes:
        return replace(super().sizes(save_dtype), rank=self.rank)

    @staticmethod
    def combined_factors(
        factors: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float], how: Combination, name: str
    ) -> tuple[Tensor, Tensor]:
        """``combine_factors``, whose result a model takes.

        Raises:
            ValueError: also, ranks that add up to more than the layer can have.
        """
        down, up = combine_factors(factors, weights, how, name)
        rank, sizes = down.shape[0], (up.shape[0], down.shape[1])
        if rank > most_ranks(sizes):
            raise ValueError(
                f"combination_type={how.combination_type!r}: the ranks of layer {name} add up to {rank}, more than "
                f"the {most_ranks(sizes)} that its {sizes[0]} x {sizes[1]} weights can have; use 'svd' with "
                f"svd_rank={min(sizes)}, which is exact there"
            )
        return down, up


LowRankT = TypeVar("LowRankT", bound=LowRankState)


class LowRankLayer(TunerLayer[LowRankT]):
    """A layer whose adapters have such a product."""

    product: MatrixProduct

    def low_rank_output(self, x: Tensor, adapter_name: str) -> Tensor:
        """What the product of one adapter makes of the layer's input; it is never formed."""
        state = self.deltas[adapter_name]
        down, up = state.factors()
        x = self._cast_input_dtype(x, down.dtype)
        return self.product.low_rank(state.dropout(x), down, up)

    def low_rank_weight(self, adapter_name: str) -> Tensor:
        """The product itself, as the base weight is stored, in the factors' dtype."""
        down, up = self.deltas[adapter_name].factors()
        weight = up @ down
        return (weight if self.product.in_dim == 1 else weight.t()).reshape(self.weight_shape)


def skeleton_of_factors(name: str, shape: tuple[int, int], tensors: Mapping[str, Tensor], rank: int) -> nn.Module:
    """The weightless layer of a file's factors ``A`` and ``B``; see ``BaseSparseModel.skeleton_layer``."""
    return layer_of_factors(name, shape, tensors, lambda ins, outs: {"A": (rank, ins), "B": (outs, rank)})


def factor_sizes(shape: tuple[int, int], in_dim: int) -> tuple[int, int]:
    """``(inputs, outputs)`` of a weight stored in this shape."""
    return shape[in_dim], shape[1 - in_dim]


def most_ranks(shape: tuple[int, int]) -> int:
    """The largest rank allowed for a layer of this shape; small ranks are allowed for every layer."""
    return max(ALWAYS_POSSIBLE, min(shape))


def check_rank(name: str, rank: int, shape: tuple[int, int], field: str) -> None:
    """Refuse ranks that no product of the weight's shape can have.

    Raises:
        ValueError: names the field, the layer and the most that is possible.
    """
    most = most_ranks(shape)
    if not 0 <= rank <= most:
        raise ValueError(
            f"{field}: a rank of {rank} for layer {name} of {shape[0]} x {shape[1]} weights; 0 to {most} are possible"
        )


def shapes_for_rank(config: BaseSparseConfig, targets: Targets, rank: int, field: str) -> dict[str, tuple[int, int]]:
    """``{layer name: shape of the stored weight}``, which the config records.

    Args:
        config: the adapter's.
        targets: its layers.
        rank: of the delta in each of them.
        field: of the config that the rank follows from, for error messages.

    Raises:
        ValueError: the adapter was made for other shapes, or the rank is impossible for one of them.
    """
    shapes = {name: stored_shape(module) for name, module in targets.items()}
    check_shapes(config, shapes)
    for name, shape in shapes.items():
        check_rank(name, rank, shape, field)
    config.weight_shapes = {name: list(shape) for name, shape in shapes.items()}
    return shapes
