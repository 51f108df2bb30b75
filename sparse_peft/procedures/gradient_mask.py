"""Gradient masks: each step moves the entries with the largest gradients only (SparCL)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from ..constraints import Count, Limits
from ..dynamics.optimizer_state import gradient_of
from ..dynamics.protocol import Moments
from ..numerics import topk_indices
from .procedure import Procedure, Resting, TrainingRun

Sparsity = Annotated[float, Limits(above=0, below=1, noun="a share")]


@dataclass(frozen=True)
class GradientMask(Procedure):
    """Step only the entries of each parameter that have the largest gradients; the others rest.

    These are the gradient masks of SparCL (https://arxiv.org/abs/2209.09476, section 3.2), on an adapter's parameters:
    each parameter keeps ``(1 - sparsity)`` of its entries, at least one. Memory and time are not saved by it.

    Args:
        sparsity: share of the entries that rest.
        every: optimizer steps that a mask is used for.
        lazy: whether resting entries and their moments stay as they are; else only their gradient is zero, and
            momentum and weight decay go on.

    Example:
        >>> from sparse_peft import SparsityCallback
        >>> from sparse_peft.procedures import GradientMask
        >>> callback = SparsityCallback(procedures=[GradientMask(sparsity=0.8)])  # of any trainer
    """

    sparsity: Sparsity = 0.8
    every: Count = 1
    lazy: bool = True

    def start(self, run: TrainingRun) -> Masks:
        return Masks(self, run)


class Masks(Moments):
    """The masks of one training.

    Attributes:
        masks: ``{parameter name: the entries that step}``.
    """

    def __init__(self, config: GradientMask, run: TrainingRun):
        self.config, self.run = config, run
        self.parameters = run.parameters()
        self.masks: dict[str, Tensor] = {}
        self._resting = Resting(run.optimizer)

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        for name, parameter in self.parameters.items():
            gradient = gradient_of(self.run.optimizer, parameter)
            if gradient is None:
                continue
            mask = self.masks.get(name)
            if mask is None or mask.shape != parameter.shape or (step - 1) % self.config.every == 0:
                mask = self.masks[name] = self._largest(gradient)
            assert parameter.grad is not None
            parameter.grad.mul_(mask)
            if self.config.lazy:
                self._resting.keep(parameter, ~mask)

    def _largest(self, gradient: Tensor) -> Tensor:
        count = max(1, round((1 - self.config.sparsity) * gradient.numel()))
        mask = torch.zeros(gradient.numel(), dtype=torch.bool, device=gradient.device)
        mask[topk_indices(gradient.flatten().abs(), count)] = True
        return mask.reshape(gradient.shape)

    def after_step(self, step: int) -> None:
        self._resting.give_back()

    def state_dict(self) -> dict[str, Any]:
        return {"masks": {name: mask.clone() for name, mask in self.masks.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # without a mask, torch's distributed checkpoints drop the empty dict
        saved = state.get("masks", {})
        self.masks = {name: mask.to(self.parameters[name].device) for name, mask in saved.items()}
