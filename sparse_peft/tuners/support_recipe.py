"""How one layer's positions are chosen from its weight, or at random."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..support import Block, Support, best_blocks, get_criterion, random_blocks, select


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
