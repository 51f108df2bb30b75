"""What a method does in the course of training, as the controller sees it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch

from .collectives import Collectives
from .records import Record

ConfigT = TypeVar("ConfigT")
LayerT = TypeVar("LayerT")


@dataclass(frozen=True)
class TrainingContext(Generic[ConfigT, LayerT]):
    """One adapter in training.

    Attributes:
        adapter: the adapter's name.
        config: the adapter's config.
        layers: ``{layer name: layer}`` of the layers that have the adapter.
        optimizer: the torch optimizer that trains it.
        total_steps: number of optimizer steps of the whole run; None if unknown.
        collectives: the processes whose gradients are averaged.
        scaler: the loss scaler of the run; None without one.
    """

    adapter: str
    config: ConfigT
    layers: Mapping[str, LayerT]
    optimizer: torch.optim.Optimizer
    total_steps: int | None
    collectives: Collectives
    scaler: torch.amp.GradScaler | None = None


class Moments:
    """What acts at the moments of an optimizer step, and travels with the optimizer's state.

    The order in optimizer step ``n``, counted from 1: ``begin_step(n)``, backward passes, ``before_step(n)``, the
    optimizer's step, ``after_step(n)``. A subclass overrides the moments that it acts in.

    Attributes:
        takes_partitions: whether all that it does with the optimizer works with a ``ZeroOptimizer``.
    """

    takes_partitions: ClassVar[bool] = False

    def begin_step(self, step: int) -> None:
        """Act before the backward passes of a step."""

    def before_step(self, step: int) -> None:
        """Act right before the optimizer steps, on the gradients that it will use; skipped steps have no call."""

    def after_step(self, step: int) -> Record | None:
        """Act after the optimizer's step; returns a record of what happened."""
        return None

    def discard_step(self) -> None:
        """Forget the backward passes since the last step, whose gradients were thrown away."""

    def close(self) -> None:
        """Remove hooks and observers at the end of training."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, strings, lists and dicts that a resumed run needs, between two steps."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a ``state_dict``; the adapter and the optimizer's state are loaded before.

        Raises:
            ValueError: the state is of other layers or positions.
        """


class Dynamics(Moments, Generic[ConfigT, LayerT]):
    """The changes of one adapter during training, besides the optimizer's steps.

    A method overrides the moments that it acts in; see ``Moments``.

    Args:
        context: see ``TrainingContext``.

    Attributes:
        adapter, config, layers, optimizer, collectives: those of the context.
    """

    def __init__(self, context: TrainingContext[ConfigT, LayerT]):
        self.adapter, self.config, self.layers = context.adapter, context.config, context.layers
        self.optimizer, self.collectives = context.optimizer, context.collectives
