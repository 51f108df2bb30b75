"""Learning rates by importance: what other data need moves slowly (ADEPT)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..constraints import Count, PositiveOrZero
from ..dynamics.protocol import Moments
from ..dynamics.records import Record
from .procedure import LossFn, Procedure, TrainingRun


@dataclass(frozen=True)
class ImportanceLearningRate(Procedure):
    """Give each parameter tensor a learning rate by how little general data need it.

    A tensor's importance ``I`` is the mean of ``|w| |g|`` over its entries, where ``g`` is the gradient of the loss on
    general data, scaled so that the least important has 0 and the most important 1. Its steps are multiplied by
    ``2 (1 - I)``, at least ``floor`` (ADEPT, https://arxiv.org/abs/2510.10071).

    The optimizer's own step is multiplied after it was made, so that schedulers, groups and moments stay what they
    are. For that a copy of the adapters' parameters exists during the step.

    Args:
        batches: of general data, all of which are used each time: a list, or a loader that can be read again.
        loss_fn: ``loss_fn(model, batch) -> scalar``; by default ``model(**batch).loss``.
        every: optimizer steps from one measurement to the next; the first is before training.
        floor: the smallest multiplier. The paper's is 0, which freezes the most important tensor.

    Example:
        >>> import torch
        >>> from sparse_peft import SparsityCallback
        >>> from sparse_peft.procedures import ImportanceLearningRate
        >>> general = [{"input_ids": torch.arange(8)[None], "labels": torch.arange(8)[None]}]
        >>> callback = SparsityCallback(procedures=[ImportanceLearningRate(general)])  # of any trainer
    """

    batches: Iterable[Any]
    loss_fn: LossFn | None = None
    every: Count = 100
    floor: PositiveOrZero = 0.1

    def start(self, run: TrainingRun) -> Rates:
        return Rates(self, run)


@dataclass(frozen=True)
class Multipliers(Record, event="rate_multipliers", plural="measurements of importance"):
    """Multipliers of the tensors' learning rates.

    Attributes:
        mean, lowest, highest: of all tensors.
    """

    mean: float
    lowest: float
    highest: float


class Rates(Moments):
    """The learning rates of one training.

    Attributes:
        multipliers: ``{parameter name: multiplier}``.
    """

    def __init__(self, config: ImportanceLearningRate, run: TrainingRun):
        self.config, self.run = config, run
        self.parameters = run.parameters()
        self.multipliers: dict[str, float] = {}
        self._before: dict[str, Tensor] = {}

    def begin_step(self, step: int) -> None:
        if not self.multipliers:
            self._measure()

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        self._before = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def after_step(self, step: int) -> Multipliers | None:
        for name, before in self._before.items():
            parameter, multiplier = self.parameters[name], self.multipliers[name]
            wide = torch.promote_types(parameter.dtype, torch.float32)
            parameter.copy_(before.to(wide).lerp(parameter.to(wide), multiplier) if multiplier else before)
        self._before = {}
        if step % self.config.every:
            return None
        self._measure()
        found = torch.tensor(list(self.multipliers.values()), dtype=torch.float64)
        return Multipliers(step, self.config.name, float(found.mean()), float(found.min()), float(found.max()))

    def _measure(self) -> None:
        sums = {name: torch.zeros_like(parameter) for name, parameter in self.parameters.items()}
        count = 0
        for gradients in self.run.gradients(self.config.batches, self.config.loss_fn, self.parameters):
            count += 1
            for name, gradient in gradients.items():
                sums[name] += gradient
        if count == 0:
            raise ValueError(
                "ImportanceLearningRate: batches has none (left); pass a list or a loader that can be read again"
            )
        mean = self.run.collectives.mean
        found = [
            float((parameter.detach().double() * mean(sums[name]).double() / count).abs().mean())
            for name, parameter in self.parameters.items()
        ]
        least, span = min(found), max(found) - min(found)
        self.multipliers = {
            name: max(self.config.floor, 2 * (1 - (one - least) / span)) if span else 1.0
            for name, one in zip(self.parameters, found, strict=True)
        }

    def state_dict(self) -> dict[str, Any]:
        return {"multipliers": dict(self.multipliers)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["multipliers"].keys() != self.parameters.keys():
            raise ValueError(
                f"the saved state of {self.config.name} is of {len(state['multipliers'])} other parameters than the "
                f"{len(self.parameters)} that train now; resume with the config the run was started with"
            )
        self.multipliers = dict(state["multipliers"])
