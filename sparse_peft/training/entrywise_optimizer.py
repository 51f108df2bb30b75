"""What the package's own optimizers share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..dynamics.optimizer_state import Seeds, restore_dtypes


class EntrywiseOptimizer(torch.optim.Optimizer):
    """An optimizer that updates one parameter after the other and moves its state with the entries itself."""

    @staticmethod
    def check_at_least_0(**options: float) -> None:
        """Refuse hyper-parameters that are negative or no numbers.

        Raises:
            ValueError: names the first of them.
        """
        for name, value in options.items():
            if not value >= 0:
                raise ValueError(f"{name}={value!r}: at least 0 is expected")

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.update(parameter, group)
        return loss

    @abstractmethod
    def update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """Step one parameter, which has a gradient."""

    @abstractmethod
    def remap_state(self, parameter: Tensor, source: Tensor, seeds: Seeds | None = None) -> None:
        """Follow a change of positions; see ``remap_``."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; state tensors keep their dtype for parameters of any dtype."""
        super().load_state_dict(state_dict)
        restore_dtypes(self, state_dict)
