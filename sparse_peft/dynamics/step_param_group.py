"""A parameter group that exists during the optimizer's step only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class StepParamGroup:
    """Steps some parameters without weight decay, and with a learning rate of their own.

    Trainers put every trained matrix and vector into one group with weight decay, and their learning rate schedules
    and checkpoints know the groups by their order. So the groups change only while the optimizer steps.

    Args:
        optimizer: the parameters' optimizer.
        parameters: the parameters, each in some group of the optimizer's.
        lr_scale: their learning rate, relative to their group's.

    Attributes:
        rates: ``{id(parameter): learning rate}`` of the last step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor], lr_scale: float):
        self.optimizer, self.lr_scale = optimizer, lr_scale
        self.members = {id(parameter) for parameter in parameters}
        self.rates: dict[int, float] = {}
        self._groups: list[dict[str, Any]] | None = None
        self._kept: list[list[Tensor]] = []
        self._handles = [
            optimizer.register_step_pre_hook(self._split),
            optimizer.register_step_post_hook(self._join),
        ]

    def replace(self, old: Tensor, new: Tensor) -> None:
        """Make another parameter a member in place of one."""
        self.members.discard(id(old))
        self.members.add(id(new))

    def close(self) -> None:
        """Remove the hooks."""
        self._join()
        for handle in self._handles:
            handle.remove()

    def _split(self, *_: Any) -> None:
        self._join()  # a step that failed left the groups split
        optimizer = self.optimizer
        self._groups = list(optimizer.param_groups)
        self._kept = [group["params"] for group in self._groups]
        for group, parameters in zip(self._groups, self._kept, strict=True):
            mine = [parameter for parameter in parameters if id(parameter) in self.members]
            if not mine:
                continue
            group["params"] = [parameter for parameter in parameters if id(parameter) not in self.members]
            own = self._group_like(group, mine)
            self.rates.update(dict.fromkeys(map(id, mine), float(own["lr"])))
            optimizer.param_groups.append(own)

    def _group_like(self, group: dict[str, Any], members: list[Tensor]) -> dict[str, Any]:
        own = {**group, "params": members, "lr": group["lr"] * self.lr_scale}
        if "weight_decay" in own:
            own["weight_decay"] = 0.0
        return own

    def _join(self, *_: Any) -> None:
        if self._groups is None:
            return
        for group, parameters in zip(self._groups, self._kept, strict=True):
            group["params"] = parameters
        del self.optimizer.param_groups[len(self._groups) :]
        self._groups = None
