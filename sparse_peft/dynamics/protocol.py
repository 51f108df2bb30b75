"""What a method does in the course of training, as the controller sees it."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

import torch

from ..registry import METHODS
from ..tuners.base_layer import TunerLayer
from .collectives import Collectives
from .records import Record


@dataclass(frozen=True)
class Setting:
    """What a dynamics has to work with.

    Attributes:
        adapter: the adapter's name.
        config: the adapter's config.
        layers: ``{layer name: layer}`` of the layers that have the adapter.
        optimizer: the torch optimizer that trains it.
        total_steps: number of optimizer steps of the whole run; None if not known.
        collectives: the processes whose gradients are averaged.
        scaler: the loss scaler of the run; None without one.
    """

    adapter: str
    config: Any
    layers: dict[str, TunerLayer]
    optimizer: torch.optim.Optimizer
    total_steps: int | None
    collectives: Collectives
    scaler: torch.amp.GradScaler | None = None


class Dynamics(Protocol):
    """One adapter's changes during training. The calls of one optimizer step, in order:"""

    def begin_step(self, step: int) -> None:
        """Before the backward passes of optimizer step number ``step``, counted from 1."""

    def before_step(self, step: int) -> None:
        """Right before the optimizer steps; gradients are what it will use. Not called for a step that is skipped."""

    def after_step(self, step: int) -> Record | None:
        """After the optimizer stepped."""

    def discard_step(self) -> None:
        """Instead of both: the backward passes since the last step were thrown away."""

    def close(self) -> None:
        """Training is over; leave nothing behind."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, strings, lists and dicts, between two steps."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def make_dynamics(setting: Setting) -> Dynamics | None:
    """The dynamics of one adapter, as the registry names it; None if nothing of it changes but the values."""
    for method in METHODS:
        if method.peft_type == setting.config.peft_type and method.dynamics is not None:
            module, _, name = method.dynamics.rpartition(".")
            return getattr(import_module(module), name).make(setting)
    return None
