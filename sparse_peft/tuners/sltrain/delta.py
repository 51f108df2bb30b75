"""The trained state of one SLTrain adapter in one layer: entries and two thin factors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor, nn

from ...ops import Combination
from ...support import Support
from ..delta import SparseDelta
from ..low_rank import LowRankState
from ..support_recipe import SupportRecipe
from .config import SLTrainConfig


class SLTrainDelta(LowRankState, SparseDelta):
    """``scale * B @ A + value_scale * scatter(values)``, as a map from inputs to outputs; see the two base classes.

    Args:
        shape, entries, name, recipe, support: as in ``SparseDelta``.
        sizes: ``(inputs, outputs)`` of the layer.
        config: the adapter's, with the scales of both parts.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        entries: int,
        name: str,
        recipe: SupportRecipe,
        support: Support | None,
        sizes: tuple[int, int],
        config: SLTrainConfig,
    ):
        SparseDelta.__init__(self, shape, entries, name, recipe, support, config.value_scale)
        self.add_factors(sizes, config.rank, config.alpha / config.rank, config.dropout)
        if config.trainable_scale:
            self.theta = nn.Parameter(torch.ones(1))
        if config.mode == "pretrain":
            # the sparse part is all of the weight at first: as nn.Linear's, at the entries
            bound = config.init_scale / math.sqrt(sizes[0]) / config.value_scale
            nn.init.uniform_(self.values, -bound, bound)

    def randomise(self) -> None:
        SparseDelta.randomise(self)
        nn.init.normal_(self.B)

    def factors(self) -> tuple[Tensor, Tensor]:
        scale = self.theta.tanh().to(self.B.dtype) if "theta" in self._parameters else self.scale
        return self.A, self.B * scale

    @classmethod
    def combine(cls, states: Sequence[Self], weights: Sequence[float], how: Combination) -> dict[str, Tensor]:
        down, up = cls.combined_factors([state.factors() for state in states], weights, how, states[0].name)
        entries = SparseDelta.combine(states, weights, replace(how, combination_type="linear", svd_rank=None))
        return {"A": down, "B": up, **entries}

    def take_file(self, positions: dict[str, Tensor], parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        taken = SparseDelta.take_file(self, positions, parameters)
        self._check_parameters([name for name in self._parameters if name != self.value_name], parameters)
        return taken

    def extra_repr(self) -> str:
        return f"rank={self.rank}, {super().extra_repr()}"
