"""How one layer's positions are chosen from its weight, or at random."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..support import (
    Block,
    Criterion,
    Given,
    Support,
    best_blocks,
    best_in_lines,
    get_criterion,
    random_blocks,
    random_in_lines,
    select,
)


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
        lines: the dimension of the weight's inputs, and the share of these that has all entries; None for all.
    """

    selection: str
    entries: int
    seed: int
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    block: Block | None = None
    lines: tuple[int, float] | None = None

    def draw(self, weight: Callable[[], Tensor], shape: tuple[int, int]) -> Support:
        """Choose the positions.

        Args:
            weight: gives the base weight in floats, as stored; called only by criteria that look at it.
            shape: of the stored weight.

        Raises:
            ValueError: the criterion needs data, or positions that were not given.
        """
        criterion = get_criterion(self.selection)
        if criterion.needs == "none":
            return self._random(shape)
        if criterion.draws:
            return self._random(shape, criterion.eligible(weight()))
        if criterion.needs == "weight":
            return self._best(criterion, weight())
        if isinstance(criterion, Given):
            raise criterion.missing(f"layer {self.name}: ")
        raise ValueError(
            f"selection={self.selection!r} needs data to choose the positions of layer {self.name}: call "
            "`config = sparse_peft.select_support(model, config, dataloader)` before `get_peft_model(model, config)`"
        )

    def _random(self, shape: tuple[int, int], among: Tensor | None = None) -> Support:
        if self.lines is not None and among is None:
            return random_in_lines(shape, self.entries, *self.lines, seed=self.seed, name=self.name)
        if self.block is None:
            return Support.random(shape, self.entries, seed=self.seed, name=self.name, among=among)
        count = self._blocks(self.block)
        return random_blocks(shape, self.block, count, seed=self.seed, name=self.name, among=among)

    def _best(self, criterion: Criterion, weight: Tensor) -> Support:
        if self.block is None and self.lines is None:
            return select(criterion, weight, self.entries, seed=self.seed, name=self.name, options=dict(self.options))
        scores = criterion.score(weight, None, **self.options)
        if self.block is None:
            assert self.lines is not None
            return best_in_lines(scores, self.entries, *self.lines, criterion.largest, self.name)
        return best_blocks(scores, self._blocks(self.block), self.block, criterion.largest, self.name)

    def _blocks(self, block: Block) -> int:
        return self.entries // (block[0] * block[1])
