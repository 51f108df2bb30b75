"""Patterns: which sets of weights may stay non-zero, and how the best of them is found from scores.

A pattern sees a weight as ``(outputs, inputs)``, whatever its layout in memory. Counts are exact, and among equal
scores the lowest position stays, on every device.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from torch import Tensor

from ..constraints import Count, Limits, OneOf, validate_fields
from ..numerics.errors import layer_prefix
from ..numerics.panels import panels
from ..numerics.topk import check_scores, topk_indices

Sparsity = Annotated[float, Limits(least=0, below=1, noun="a share of zeros")]
SCOPES = ("row", "column", "matrix")
"""What scores are compared within: the weights of one output, those of one input, or the whole weight."""

Shape = tuple[int, int]


class Pattern(ABC):
    """A constraint on the weights that stay.

    The smallest things that stay or go are *units*: single weights, or blocks of them.
    """

    def __post_init__(self) -> None:
        validate_fields(self)

    @property
    @abstractmethod
    def density(self) -> float:
        """Share of the weights that stay."""

    def check(self, shape: Shape, name: str) -> None:  # noqa: B027  (most patterns fit every shape)
        """Refuse a weight ``(outputs, inputs)`` that the pattern does not fit.

        Raises:
            ValueError: names the layer, its shape and the cure.
        """

    @abstractmethod
    def block(self, shape: Shape) -> Shape:
        """``(outputs, inputs)`` of a unit."""

    def grid(self, shape: Shape) -> Shape:
        """Number of units along the outputs and the inputs."""
        height, width = self.block(shape)
        return shape[0] // height, shape[1] // width

    def unit_scores(self, scores: Tensor) -> Tensor:
        """``grid`` scores of the units: sums of their weights' scores."""
        rows, cols = scores.shape
        height, width = self.block((rows, cols))
        if (height, width) == (1, 1):
            return scores
        return scores.view(rows // height, height, cols // width, width).sum((1, 3))

    def keep(self, scores: Tensor, units: int | None = None, *, name: str = "") -> Tensor:
        """The best set of weights.

        Args:
            scores: ``(outputs, inputs)``; the largest stay.
            units: number of units that stay; by default the pattern's share, rounded.
            name: the layer's name, for error messages.

        Returns:
            ``(outputs, inputs)`` bool: True where a weight stays.

        Raises:
            ValueError: scores that are NaN, or a shape that the pattern does not fit.
        """
        rows, cols = scores.shape
        self.check((rows, cols), name)
        check_scores(scores.reshape(-1), name)
        across = self.unit_scores(scores)
        chosen = self._best(across, round(self.density * across.numel()) if units is None else units, name)
        height, width = self.block((rows, cols))
        return chosen.repeat_interleave(height, 0).repeat_interleave(width, 1) if height * width > 1 else chosen

    def _best(self, scores: Tensor, units: int, name: str) -> Tensor:
        """The ``units`` best of the whole weight."""
        kept = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
        kept[topk_indices(scores.reshape(-1), units, name=name)] = True
        return kept.view_as(scores)


def _best_of_each_row(scores: Tensor, counts: Tensor) -> Tensor:
    """The ``counts[i]`` best of row ``i``, ties to the lowest position: bool of the scores' shape."""
    kept = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    places = torch.arange(scores.shape[1], device=scores.device)
    for start, stop in panels(scores.shape[0], scores.shape[1] * 3 * torch.int64.itemsize):
        order = scores[start:stop].argsort(dim=1, descending=True, stable=True)
        kept[start:stop].scatter_(1, order, places < counts[start:stop, None])
    return kept


@dataclass(frozen=True)
class _Share(Pattern):
    """A share of the units becomes zero."""

    sparsity: Sparsity

    @property
    def density(self) -> float:
        return 1 - self.sparsity


@dataclass(frozen=True)
class Unstructured(_Share):
    """Single weights, anywhere.

    Args:
        sparsity: share of the weights that become zero, in [0, 1).
        scope: what scores are compared within: ``"row"`` (the weights of one output), ``"column"`` (those of one
            input) or ``"matrix"``. By default the one that the score's authors use. Rows, or columns, keep equally
            many weights, up to one.

    Example:
        >>> import torch
        >>> from sparse_peft.sparsify import Unstructured
        >>> scores = torch.tensor([[4.0, 3.0, 2.0, 1.0], [8.0, 7.0, 6.0, 5.0]])
        >>> Unstructured(0.5, scope="row").keep(scores).int().tolist()
        [[1, 1, 0, 0], [1, 1, 0, 0]]
        >>> Unstructured(0.5, scope="matrix").keep(scores).int().tolist()
        [[0, 0, 0, 0], [1, 1, 1, 1]]
    """

    scope: Annotated[str, OneOf(SCOPES)] | None = None

    def block(self, shape: Shape) -> Shape:
        return 1, 1

    def _best(self, scores: Tensor, units: int, name: str) -> Tensor:
        if self.scope not in ("row", "column"):
            return super()._best(scores, units, name)
        lines = scores if self.scope == "row" else scores.t()
        each, more = divmod(units, lines.shape[0])
        counts = torch.full((lines.shape[0],), each, device=scores.device)
        counts[:more] += 1
        kept = _best_of_each_row(lines, counts)
        return kept if self.scope == "row" else kept.t()


@dataclass(frozen=True)
class NM(Pattern):
    """``n`` weights stay of every ``m`` consecutive inputs of an output.

    Args:
        n: weights that stay.
        m: size of a group.
        pad: accept a number of inputs that ``m`` does not divide: the last group is then filled up with weights that
            go first. Kernels for N:M weights do not take such layers.

    Example:
        >>> import torch
        >>> from sparse_peft.sparsify import NM
        >>> NM(2, 4).keep(torch.tensor([[1.0, 9.0, 3.0, 2.0, 5.0, 5.0, 5.0, 5.0]])).int().tolist()
        [[0, 1, 1, 0, 1, 1, 0, 0]]
    """

    n: Count
    m: Count
    pad: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n > self.m:
            raise ValueError(f"n={self.n}, m={self.m}: n of m weights stay, so n is at most m")

    @property
    def density(self) -> float:
        return self.n / self.m

    def check(self, shape: Shape, name: str) -> None:
        if shape[1] % self.m and not self.pad:
            raise ValueError(
                f"{layer_prefix(name)}{shape[1]} inputs are no multiple of m={self.m}; leave the layer out with "
                f"exclude_modules, or pass pattern=NM({self.n}, {self.m}, pad=True)"
            )

    def block(self, shape: Shape) -> Shape:
        return 1, 1

    def _best(self, scores: Tensor, units: int, name: str) -> Tensor:
        rows, cols = scores.shape
        groups = scores
        if cols % self.m:
            fill = scores.new_full((rows, self.m - cols % self.m), -torch.inf)
            groups = torch.cat((scores, fill), 1)
        groups = groups.reshape(-1, self.m)
        kept = _best_of_each_row(groups, torch.full((groups.shape[0],), self.n, device=scores.device))
        return kept.view(rows, -1)[:, :cols].contiguous()


@dataclass(frozen=True)
class Blocks(_Share):
    """Whole blocks of a grid.

    Args:
        sparsity: share of the blocks that become zero, in [0, 1).
        outputs: height of a block.
        inputs: width of a block.

    Example:
        >>> import torch
        >>> from sparse_peft.sparsify import Blocks
        >>> Blocks(0.5, 1, 2).keep(torch.tensor([[1.0, 1.0, 2.0, 2.0]])).int().tolist()
        [[0, 0, 1, 1]]
    """

    outputs: Count
    inputs: Count

    def check(self, shape: Shape, name: str) -> None:
        if shape[0] % self.outputs or shape[1] % self.inputs:
            raise ValueError(
                f"{layer_prefix(name)}{shape[0]} outputs and {shape[1]} inputs do not consist of blocks of "
                f"{self.outputs} x {self.inputs}; choose a block that divides them, or leave the layer out with "
                "exclude_modules"
            )

    def block(self, shape: Shape) -> Shape:
        return self.outputs, self.inputs


@dataclass(frozen=True)
class Channels(_Share):
    """All weights of an input, or of an output.

    Args:
        sparsity: share of the channels that become zero, in [0, 1).
        side: ``"in"`` or ``"out"``.

    Example:
        >>> import torch
        >>> from sparse_peft.sparsify import Channels
        >>> Channels(0.5, side="in").keep(torch.tensor([[1.0, 3.0], [2.0, 4.0]])).int().tolist()
        [[0, 1], [0, 1]]
    """

    side: Literal["in", "out"] = "in"

    def block(self, shape: Shape) -> Shape:
        return (shape[0], 1) if self.side == "in" else (1, shape[1])


PatternLike = float | str | Pattern
"""A share of zeros, ``"n:m"``, or a pattern."""


def as_pattern(pattern: PatternLike, scope: str | None = None) -> Pattern:
    """The pattern that a number or a text stands for.

    Args:
        pattern: ``0.5`` or ``"0.5"`` for half of the weights at zero, ``"2:4"`` for two of four kept, or a pattern.
        scope: of unstructured patterns that have none.

    Raises:
        TypeError: something else.
        ValueError: a share out of range, or a text of another form.

    Example:
        >>> from sparse_peft.sparsify import as_pattern
        >>> as_pattern("2:4"), as_pattern(0.6, scope="row")
        (NM(n=2, m=4, pad=False), Unstructured(sparsity=0.6, scope='row'))
    """
    if isinstance(pattern, str):
        if found := re.fullmatch(r"(\d+):(\d+)", pattern.strip()):
            return NM(int(found[1]), int(found[2]))
        try:
            pattern = float(pattern)
        except ValueError as error:
            raise ValueError(
                f"pattern={pattern!r}: a share of zeros such as 0.5, or n:m such as '2:4', is expected"
            ) from error
    if isinstance(pattern, bool) or not isinstance(pattern, (int, float, Pattern)):
        raise TypeError(
            f"pattern={pattern!r}: a share of zeros such as 0.5, n:m such as '2:4', or a Pattern is expected"
        )
    made = pattern if isinstance(pattern, Pattern) else Unstructured(float(pattern))
    if isinstance(made, Unstructured) and made.scope is None and scope is not None:
        made = replace(made, scope=scope)
    return made
