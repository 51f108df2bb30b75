"""Scores that say which input or output channels of a layer are worth training (the criteria of S2FT)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .activations import feature_norms
from .gradient_hooks import NOT_FINITE, GradientPass, Place

# What each criterion looks at, and whether its large scores train unless the user says otherwise.
CHANNEL_CRITERIA = {
    "random": ("none", False),
    "weight": ("weight", False),
    "activation": ("activation", False),
    "product": ("activation", False),
    "gradient": ("gradient", True),
}
"""Criteria for channels: ``{name: (what it looks at, whether the largest scores train)}``."""


@dataclass(frozen=True)
class Side:
    """The channels of one layer that may train.

    Attributes:
        shape: ``(rows, cols)`` of the stored weight.
        dim: which of the two counts the channels.
        in_dim: which of the two is the input's.
        width: columns of a channel.
    """

    shape: tuple[int, int]
    dim: int
    in_dim: int
    width: int = 1

    @property
    def is_input(self) -> bool:
        return self.dim == self.in_dim

    @property
    def size(self) -> int:
        """Number of channels."""
        return self.shape[self.dim] // self.width

    @property
    def cost(self) -> int:
        """Parameters of one channel."""
        return self.shape[1 - self.dim] * self.width


def _sum_over(squares: Tensor, side: Side) -> Tensor:
    """Sums of ``(rows, cols)`` over everything but the channels."""
    sums = squares.sum(1 - side.dim)
    return sums.view(-1, side.width).sum(1)


def weight_squares(weight: Tensor, side: Side) -> Tensor:
    """``(channels,)`` float32 squared L2 norms of a stored weight's channels."""
    return _sum_over(weight.detach().to(torch.float32).square(), side)


class _ChannelGradients(GradientPass):
    """Sums over batches of the squared gradients' norms: no dense gradient is kept."""

    def __init__(self, sides: dict[str, Side], panel_bytes: int):
        super().__init__({name: Place(side.shape, side.in_dim) for name, side in sides.items()}, panel_bytes)
        self.sides = sides
        self.total: dict[str, Tensor] = {}
        self._new: dict[str, Tensor] = {}

    def begin(self, is_last: bool) -> None:
        self._new = {}

    def was_reached(self, name: str) -> bool:
        return name in self.total

    def take(self, name: str, panels: Iterator[tuple[int, int, Tensor]]) -> str | None:
        side = self.sides[name]
        sums = None
        for start, stop, panel in panels:
            if sums is None:
                sums = panel.new_zeros(side.size)
            squares = _sum_over(panel.square_(), side)
            if side.dim == 0:
                sums[start:stop] = squares
            else:
                sums += squares
        if not bool(sums.isfinite().all()):
            return NOT_FINITE.format(name)
        self._new[name] = sums
        return None

    def commit(self) -> None:
        for name, sums in self._new.items():
            self.total[name] = self.total[name] + sums if name in self.total else sums


def channel_squares(
    criterion: str,
    model: nn.Module,
    targets: dict[str, nn.Module],
    sides: dict[str, Side],
    batches: Iterable,
    *,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    weight_of: Callable[[nn.Module], Tensor],
    panel_bytes: int,
) -> dict[str, Tensor]:
    """Squared scores of the layers' channels, in one pass over data; squares, because structures sum them.

    ``"activation"`` is the L2 norm of the channel's activations over all tokens, of the layer's input or output;
    ``"product"`` that times the norm of the channel's weights; ``"gradient"`` the norm of the channel's weight
    gradient, in root sum of squares over the batches.

    Args:
        criterion: a key of [`CHANNEL_CRITERIA`][sparse_peft.calibrate.CHANNEL_CRITERIA] that looks at activations or
            gradients.
        model: the base model, without adapters.
        targets: ``{layer name: linear layer}`` in the model's order.
        sides: ``{layer name: its channels}``.
        batches: iterated once; tensors in them are moved to the model's device. A batch is a micro-batch.
        loss_fn: ``loss_fn(model, batch) -> scalar``; default ``model(**batch).loss``.
        weight_of: gives a layer's weight in floats, as stored.
        panel_bytes: limit, in bytes, of a temporary that grows with a weight.

    Returns:
        ``{layer name: (channels,) float32}``.

    Raises:
        ValueError: no usable data, or a layer that it never reached.
    """
    if criterion == "gradient":
        gradients = _ChannelGradients(sides, panel_bytes)
        gradients.run(model, targets, batches, loss_fn)
        return gradients.total
    outputs = {name for name, side in sides.items() if not side.is_input}
    norms = feature_norms(model, targets, batches, loss_fn=loss_fn, panel_bytes=panel_bytes, outputs=outputs)
    squares = {name: norm.square() for name, norm in norms.items()}
    if criterion == "activation":
        return squares
    return {name: square * weight_squares(weight_of(targets[name]), sides[name]) for name, square in squares.items()}
