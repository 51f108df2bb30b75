"""Scores of a layer's input or output channels: the criteria of S2FT (https://arxiv.org/abs/2412.06289)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .activations import feature_norms
from .gradient_hooks import NOT_FINITE, GradientPass, Panel
from .layer_view import LayerView
from .model_pass import ModelPass

CHANNEL_CRITERIA = {
    "random": ("none", False),
    "weight": ("weight", False),
    "activation": ("activation", False),
    "product": ("activation", False),
    "gradient": ("gradient", True),
}
"""Criteria for channels: ``{name: (what it needs, whether the largest scores train by default)}``."""


@dataclass(frozen=True)
class Side:
    """The channels of one layer that may train.

    Attributes:
        shape: ``(rows, cols)`` of the stored weight.
        dim: the dimension that counts the channels.
        in_dim: the dimension of input features.
        width: columns per channel.
        matrices: the number of matrices that the weight consists of, one above the other; each has channels of its
            own, numbered one matrix after the other.
    """

    shape: tuple[int, int]
    dim: int
    in_dim: int
    width: int = 1
    matrices: int = 1

    @property
    def is_input(self) -> bool:
        """Whether the channels are input channels."""
        return self.dim == self.in_dim

    @property
    def size(self) -> int:
        """Number of channels."""
        return self.matrices * self.part.shape[self.dim] // self.width

    @property
    def cost(self) -> int:
        """Parameters of one channel."""
        return self.part.shape[1 - self.dim] * self.width

    @property
    def part(self) -> Side:
        """The channels of one matrix."""
        return replace(self, shape=(self.shape[0] // self.matrices, self.shape[1]), matrices=1)


def _sum_over(squares: Tensor, side: Side) -> Tensor:
    """Sums of ``(rows, cols)`` over everything but the channels."""
    sums = squares.view(side.matrices, -1, side.shape[1]).sum(2 - side.dim)
    return sums.reshape(-1, side.width).sum(1)


def weight_squares(weight: Tensor, side: Side) -> Tensor:
    """``(channels,)`` float32 squared L2 norms of a stored weight's channels."""
    return _sum_over(weight.detach().to(torch.float32).square(), side)


class _ChannelGradients(GradientPass):
    """Sums over batches of the squared norms of the channels' gradients."""

    def __init__(self, layers: Sequence[LayerView], sides: Mapping[str, Side]) -> None:
        super().__init__(layers)
        self.sides = {part.name: sides[layer.name].part for layer in layers for part in layer.parts}
        self.total: dict[str, Tensor] = {}
        self._new: dict[str, Tensor] = {}

    def begin(self, is_last: bool) -> None:
        self._new = {}

    def was_reached(self, name: str) -> bool:
        return name in self.total

    def take(self, name: str, panels: Iterator[Panel]) -> str | None:
        side = self.sides[name]
        sums: Tensor | None = None
        for start, stop, panel in panels:
            if sums is None:
                sums = panel.new_zeros(side.size)
            squares = _sum_over(panel.square_(), side)
            if side.dim == 0:
                sums[start:stop] = squares
            else:
                sums += squares
        if sums is None or not bool(sums.isfinite().all()):
            return NOT_FINITE.format(name)
        self._new[name] = sums
        return None

    def commit(self) -> None:
        for name, sums in self._new.items():
            self.total[name] = self.total[name] + sums if name in self.total else sums


def channel_squares(
    criterion: str, data: ModelPass, layers: Sequence[LayerView], sides: Mapping[str, Side]
) -> dict[str, Tensor]:
    """Squared scores of the layers' channels, in one pass over data; squares, because structures sum them.

    ``"activation"`` is the L2 norm of the channel's activations over all tokens, of the layer's input or output.
    ``"product"`` multiplies it by the norm of the channel's weights. ``"gradient"`` is the norm of the channel's
    weight gradient, as the root of the sum of squares over the batches.

    Args:
        criterion: a key of [`CHANNEL_CRITERIA`][sparse_peft.calibrate.CHANNEL_CRITERIA] that is computed from
            activations or gradients.
        data: the model and its batches.
        layers: the target layers, in the model's order.
        sides: ``{layer name: its channels}``.

    Returns:
        ``{layer name: (channels,) float32}``; zeros for fused experts that no token reached.

    Raises:
        ValueError: no usable data, or a layer that it never reached.
    """
    if criterion == "gradient":
        gradients = _ChannelGradients(layers, sides)
        gradients.run(data)
        return _of_layers(layers, sides, gradients.total)
    outputs = {name for name, side in sides.items() if not side.is_input}
    norms = feature_norms(data, layers, outputs)
    squares = _of_layers(layers, sides, {name: norm.square() for name, norm in norms.items()})
    if criterion == "activation":
        return squares
    weights = {layer.name: weight_squares(layer.weight(), sides[layer.name]) for layer in layers}
    return {name: square * weights[name] for name, square in squares.items()}


def _of_layers(
    layers: Sequence[LayerView], sides: Mapping[str, Side], found: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What was found of layers and of experts, by layer."""
    joined = {}
    for layer in layers:
        names = [part.name for part in layer.parts]
        like = next(found[name] for name in names if name in found)
        none = torch.zeros(sides[layer.name].part.size, dtype=like.dtype, device=like.device)
        joined[layer.name] = torch.cat([found.get(name, none) for name in names])
    return joined
