"""Choosing the trained positions of a model's layers: now from the weights, or beforehand from data."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from torch import Tensor, distributed, nn

from ..support import Block, Support, best_blocks, get_criterion, random_blocks, select

Config = TypeVar("Config", bound=PeftConfig)


@dataclass(frozen=True)
class SupportRecipe:
    """How one layer's positions are chosen: enough to choose them later, and the same on every machine.

    Attributes:
        selection: name of the criterion.
        entries: how many positions.
        seed: of the random criterion, together with the layer's name.
        name: the layer's name.
        options: further arguments of the criterion.
        block: ``(rows, cols)`` of the blocks that train whole; None for single entries.
    """

    selection: str
    entries: int
    seed: int
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    block: Block | None = None

    def draw(self, weight: Callable[[], Tensor], shape: tuple[int, int]) -> Support:
        """Choose the positions.

        Args:
            weight: gives the base weight in floats, as stored; called only by criteria that look at it.
            shape: of the stored weight.

        Raises:
            ValueError: the criterion needs data.
        """
        criterion = get_criterion(self.selection)
        blocks = None if self.block is None else self.entries // (self.block[0] * self.block[1])
        if criterion.needs == "none":
            if blocks is not None:
                return random_blocks(shape, self.block, blocks, seed=self.seed, name=self.name)
            return Support.random(shape, self.entries, seed=self.seed, name=self.name)
        if criterion.needs == "weight":
            if blocks is not None:
                scores = criterion.score(weight(), None, **self.options)
                return best_blocks(scores, blocks, self.block, criterion.largest, self.name)
            return select(
                criterion, weight(), self.entries, seed=self.seed, name=self.name, options=dict(self.options)
            )
        raise ValueError(
            f"selection={self.selection!r} needs data to choose the positions of layer {self.name}: call "
            "`config = sparse_peft.select_support(model, config, dataloader)` before `get_peft_model(model, config)`"
        )


def select_support(
    model: nn.Module,
    config: Config,
    data: Iterable | None = None,
    *,
    gradients: dict[str, Tensor] | None = None,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    oversample: float = 8.0,
) -> Config:
    """Choose the trained positions of every target layer from data, in one pass, before the adapter is made.

    No dense gradient of more than one layer is alive at a time. With several batches the first one proposes
    ``oversample`` times the budget and all of them are summed at those candidates only; ``oversample=float("inf")``
    sums everything.

    In a distributed run all processes call it, and all get what process 0 chose from its data.

    Args:
        model: the base model, without adapters.
        config: a [`SparseConfig`][sparse_peft.SparseConfig] or [`S2FTConfig`][sparse_peft.S2FTConfig] with a
            data-driven ``selection``.
        data: batches, each passed to the model as ``model(**batch).loss``, or to ``loss_fn``.
        gradients: instead of data, ``{layer or parameter name: gradient of its weight}``.
        loss_fn: ``loss_fn(model, batch) -> scalar``.
        oversample: candidates kept per trained entry while later batches are summed.

    Returns:
        A copy of ``config`` that carries the positions; pass it to ``get_peft_model`` or a trainer's ``peft_config``.

    Raises:
        ValueError: neither or both of ``data`` and ``gradients`` given, a layer no batch reached, or a bad budget.
    """
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
    chosen = tuner.select_support(
        model, copy.copy(config), data, gradients=gradients, loss_fn=loss_fn, oversample=oversample
    )
    if distributed.is_available() and distributed.is_initialized():
        # every process saw data of its own; they must train the same positions
        supports = [{name: support.to("cpu") for name, support in chosen.supports.items()}]
        distributed.broadcast_object_list(supports, src=0)
        chosen.supports = supports[0]
    return chosen
