"""Scores of weights: the criteria that choose trained entries, of which the largest stay here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..numerics.rng import uniform
from ..support.criteria import CRITERIA, Statistics
from .sparsegpt import SparseGPT

SCORES = (
    *(c.name for c in CRITERIA.values() if c.largest and not c.decides_count and not c.restricts),
    SparseGPT.name,
)
"""Names of the scores: criteria of [`CRITERIA`][sparse_peft.support.CRITERIA], and SparseGPT."""

# What the authors compare scores within, where it is not the whole weight.
_SCOPES = {"wanda": "row"}

Needs = Literal["none", "weight", "gradient", "activation", "second moment"]


@dataclass(frozen=True)
class LayerData:
    """Statistics of one layer over data; None for what was not collected.

    Attributes:
        sums: ``(2, inputs)`` float64 sums of the inputs and of their squares.
        moment: ``(inputs, inputs)`` second moment of the inputs.
        tokens: number of tokens in ``sums``.
        gradient: ``(outputs, inputs)`` float32 sum of the weight's gradients or of their squares.
        batches: in ``gradient``.
    """

    sums: Tensor | None = None
    moment: Tensor | None = None
    tokens: int = 0
    gradient: Tensor | None = None
    batches: int = 1


@dataclass(frozen=True)
class Score:
    """One of the scores by name.

    Args:
        name: one of ``SCORES``.
        seed: of random scores, together with the layer's name.
    """

    name: str
    seed: int = 0

    @property
    def needs(self) -> Needs:
        """What the score is computed from."""
        needs: Needs = "second moment" if self.name == SparseGPT.name else CRITERIA[self.name].needs  # type: ignore[assignment]
        return needs

    @property
    def scope(self) -> str:
        """What scores are compared within, unless the pattern says it."""
        return _SCOPES.get(self.name, "matrix")

    def of(self, weight: Tensor, data: LayerData, name: str) -> Tensor:
        """``(outputs, inputs)`` float32 scores of a weight ``(outputs, inputs)``."""
        if self.name == "random":
            drawn = uniform(weight.numel(), seed=self.seed, name=name)
            return drawn.view(weight.shape).to(weight.device)
        criterion = CRITERIA[self.name]
        if criterion.needs == "activation":
            assert data.sums is not None
            return criterion.score(weight, Statistics(input_norms=data.sums[1].sqrt().to(torch.float32)))
        return criterion.score(weight, Statistics(gradient=data.gradient, batches=data.batches))
