"""ARMOR: an N:M core between block-diagonal matrices, fitted to a layer without training.

Source: https://arxiv.org/abs/2510.05528. A weight is written as ``left @ core @ right``: ``core`` keeps the pattern,
and ``left`` and ``right`` have blocks of ``b x b`` on their diagonals. The paper alternates Adam's steps with exact
steps of single groups; here every step is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..constraints import Count, PositiveOrZero, validate_fields
from ..numerics.errors import layer_prefix
from .block_fit import BlockFit, Factors, blockwise, identity_blocks, times_left, times_right
from .patterns import NM, Pattern, Shape
from .replaced import ReplacedLinear, check_replaceable

_MOST_SUPPORTS = 100  # sets of kept weights of a group, all of which are tried


class ArmorLinear(ReplacedLinear):
    """A linear layer whose weight is ``left @ core @ right``.

    A token costs ``block * (in_features + out_features)`` multiplications more than the core.

    Args:
        original: the layer whose weight has become the core.
        left: ``(out_features / block, block, block)``.
        right: ``(in_features / block, block, block)``.

    Example:
        >>> import torch
        >>> from sparse_peft.sparsify import prune
        >>> model, data = torch.nn.Sequential(torch.nn.Linear(64, 32)), [torch.randn(50, 64)]
        >>> masks = prune(model, "2:4", "nowag", refine="armor", calibration=data, loss_fn=lambda m, x: m(x))
        >>> type(model[0]).__name__, masks.density, model[0].left.shape
        ('ArmorLinear', 0.5, torch.Size([1, 32, 32]))
    """

    def __init__(self, original: nn.Module, left: Tensor, right: Tensor) -> None:
        super().__init__(original, "core")
        trains = self.weight.requires_grad
        self.left, self.right = (nn.Parameter(blocks, requires_grad=trains) for blocks in (left, right))

    core: nn.Parameter

    @property
    def block(self) -> int:
        """Size of a block."""
        return self.left.shape[1]

    @property
    def weight(self) -> Tensor:
        """The core, in the layout of the original weight."""
        return self.core

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in_features)`` to ``(..., out_features)``."""
        out = blockwise(self.left, self.product(blockwise(self.right, x)))
        return out if self.bias is None else out + self.bias

    def to_dense(self) -> Tensor:
        """The weight ``(out_features, in_features)`` that the layer multiplies by; it has no zeros."""
        return times_right(times_left(self.left, self.rows()), self.right)


@dataclass(frozen=True)
class Armor:
    """The pattern's weights are set between block-diagonal matrices, and all three are fitted (section 3).

    The loss is ``sum (W - left @ core @ right)² h_j / (r_i² c_j²)``, with the mean squares ``h`` of the inputs, the
    norms ``c`` of the weight's columns and then ``r`` of its rows: the error of NoWag's normalised weight. It starts
    from the pruned weight and the identity. A sweep solves ``left``, then ``right``, by least squares, and then each
    group of the core: all its supports with their best values are compared. No step raises the loss, but for
    rounding; the best state is kept.

    Args:
        block: ``b``; divides the outputs and the inputs, and is a multiple of the pattern's ``m``.
        sweeps: most of them.
        tolerance: of the loss, relative to the start's: a sweep that gains less is the last.
    """

    block: Count = 32
    sweeps: Count = 10
    tolerance: PositiveOrZero = 1e-3
    name: ClassVar[str] = "armor"

    def __post_init__(self) -> None:
        validate_fields(self)

    def check(self, pattern: Pattern) -> None:
        """Refuse patterns that have no groups, or too many supports.

        Raises:
            ValueError: names the patterns that fit.
        """
        if not isinstance(pattern, NM) or self.block % pattern.m or comb(pattern.m, pattern.n) > _MOST_SUPPORTS:
            raise ValueError(
                f"refine='armor' tries all supports of the groups in blocks of {self.block}, which does not go with "
                f"{pattern}; use '2:4', or n:m with at most {_MOST_SUPPORTS} supports and an m that divides block"
            )

    def check_layer(self, shape: Shape, name: str) -> None:
        """Refuse a weight ``(outputs, inputs)`` that has no such blocks, or a model that is a layer itself.

        Raises:
            ValueError: names the layer and the cure.
        """
        check_replaceable(name)
        if shape[0] % self.block or shape[1] % self.block:
            raise ValueError(
                f"{layer_prefix(name)}{shape[0]} outputs and {shape[1]} inputs do not consist of blocks of "
                f"{self.block}; use refine=Armor(block=...), or leave the layer out with exclude_modules"
            )

    @torch.no_grad()
    def refine(
        self, weight: Tensor, kept: Tensor, square: Tensor, pattern: NM, losses: list[float] | None = None
    ) -> Factors:
        """Fit the three factors of one weight.

        Args:
            weight: ``(outputs, inputs)`` floats, before pruning.
            kept: ``(outputs, inputs)`` bool, which the core starts from.
            square: ``(inputs,)`` mean square of each input.
            pattern: of ``kept``.
            losses: a list for the loss at the start and after each sweep.

        Returns:
            The factors in the weight's dtype; rounded, too, their loss is not above the start's.
        """
        target = weight.to(torch.promote_types(weight.dtype, torch.float32))
        left, right = (identity_blocks(size, self.block, target) for size in weight.shape)
        start = Factors(target * kept, kept.clone(), left, right)
        fit = BlockFit(target, start.copy(target.dtype), *_weights_of(target, square), pattern.n, pattern.m)
        best, found = start, [fit.loss(start)]
        for _ in range(self.sweeps):
            fit.sweep()
            found.append(fit.loss(fit.now))
            if found[-1] < min(found[:-1]):
                best = fit.now.copy(target.dtype)
            if not found[-2] - found[-1] > self.tolerance * found[0]:
                break
        if losses is not None:
            losses.extend(found)
        rounded = best.copy(weight.dtype)
        return rounded if fit.loss(rounded) < found[0] else start.copy(weight.dtype)


def _weights_of(weight: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
    """The loss's weights of outputs and of inputs; 0 for those without any weight."""
    columns = weight.norm(dim=0)
    inputs = torch.where(columns > 0, square / columns.double().square(), 0.0)
    rows = (weight / columns.clamp(min=torch.finfo(weight.dtype).tiny)).norm(dim=1)
    return torch.where(rows > 0, rows.double().pow(-2), 0.0), inputs
