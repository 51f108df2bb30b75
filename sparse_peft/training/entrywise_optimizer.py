"""Base class of the package's optimizers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor

from ..dynamics.optimizer_state import ObservedMoments, restore_dtypes


class EntrywiseOptimizer(torch.optim.Optimizer):
    """Updates one parameter after the other, and moves its state when entries change their positions."""

    @staticmethod
    def check_at_least_0(**options: float) -> None:
        """Refuse hyper-parameters that are negative or not numbers.

        Raises:
            ValueError: names the first of them.
        """
        for name, value in options.items():
            if not value >= 0:
                raise ValueError(f"{name}={value!r}: at least 0 is expected")

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step.

        Args:
            closure: evaluates the model again and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.update(parameter, parameter.grad, group)
        return loss

    @abstractmethod
    def update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """Step one parameter of a group."""

    @abstractmethod
    def remap_state(self, parameter: Tensor, source: Tensor, seeds: ObservedMoments | None = None) -> None:
        """Move a parameter's state with its entries; the arguments are those of ``remap_``."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; its tensors keep their dtype for parameters of any dtype."""
        super().load_state_dict(state_dict)
        restore_dtypes(self, state_dict)
