"""The trained state of whole channels: their values, and four bytes for each channel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor

from ...dynamics.zero import shape_of
from ...ops import Combination
from ...support import ChannelSupport, ExpertColumns, Support
from ..base_state import UNSET, TrainedState
from ..delta import Delta
from ..files.checks import check_dtype, check_values
from ..forms import LoraFactors, StateSizes, factors_of_lines

BUFFERS = ("rows", "columns")


Channels = ChannelSupport | ExpertColumns


def whole_channels(support: Support) -> Channels:
    """The support, which must be one of whole channels.

    Raises:
        TypeError: it is one of single entries.
    """
    if not isinstance(support, Channels):
        raise TypeError(f"layer {support.name}: a support of single entries, where one of whole channels is expected")
    return support


def _across(shape: tuple[int, int], dim: int, matrices: int) -> int:
    """Entries of a row, or of a column of one matrix."""
    return shape[1] if dim == 0 else shape[0] // matrices


class ChannelDelta(Delta):
    """``values``, as the matrix ``(channels, cols)`` or ``(rows, channels)``, is added to those rows or columns.

    Args:
        shape: ``(rows, cols)`` of the weight as stored.
        dim: 0: rows train, 1: columns do.
        count: number of channels.
        width: columns of a channel, more than 1 in convolutions.
        matrices: the number of matrices that the weight consists of; each has columns of its own.
        name: the layer's name.
        draw: see ``Delta``.
        support: the channels, or None where they come later (from a file).
        scale: see ``Delta``.
    """

    position_names = BUFFERS

    def __init__(
        self,
        shape: tuple[int, int],
        dim: int,
        count: int,
        width: int,
        matrices: int,
        name: str,
        draw: Callable[[Callable[[], Tensor], tuple[int, int]], Support],
        support: Support | None = None,
        scale: float = 1.0,
    ):
        super().__init__(shape, count * width * _across(shape, dim, matrices), name, draw, scale)
        self.dim, self.width, self.matrices = dim, width, matrices
        if support is None:
            self.keep_positions({BUFFERS[dim]: torch.full((count,), UNSET, dtype=torch.int32)})
        else:
            self.keep_support(support)

    @property
    def count(self) -> int:
        """Number of channels."""
        return self.entries // (self.width * _across(self.shape, self.dim, self.matrices))

    @classmethod
    def combine(cls, states: Sequence[Self], weights: Sequence[float], how: Combination) -> dict[str, Tensor]:
        kinds = {BUFFERS[state.dim] for state in states}
        if len(kinds) > 1:
            raise ValueError(
                f"layer {states[0].name}: one adapter trains its rows and another its columns, and no S2FT adapter "
                "has both; sparse_peft.adapters.compose makes a sparse delta of their saved folders"
            )
        return super().combine(states, weights, how)

    def combines_with(self, other: TrainedState) -> bool:
        return isinstance(other, ChannelDelta) and self.dim == other.dim

    def lora_factors(self, in_dim: int) -> LoraFactors:
        if self.matrices > 1 or not isinstance(self.support, ChannelSupport):
            raise ValueError(
                f"layer {self.name}: channels of fused experts are no LoRA of one layer; export the merged model, or "
                "entries with save_as_sparse"
            )
        return factors_of_lines(self.sparse_part(), self.dim, self.support.lines, in_dim)

    def sizes(self, save_dtype: torch.dtype) -> StateSizes:
        sizes = super().sizes(save_dtype)
        if self.matrices > 1:  # each expert keeps its inputs
            return replace(sizes, position_bytes=4 * self.count)
        return replace(sizes, channels=(self.dim, self.count), position_bytes=4 * self.count)

    def support_from(self, buffer: Tensor) -> Channels:
        if self.dim == 1 and self.matrices > 1:
            return ExpertColumns(self.shape, self.matrices, buffer, name=self.name)
        return ChannelSupport(self.shape, self.dim, buffer, self.width, name=self.name)

    def position_layout(self) -> dict[str, tuple[int, torch.dtype]]:
        return {BUFFERS[self.dim]: (self.count, torch.int32)}

    def file_positions(self, support: Support) -> dict[str, Tensor]:
        return {BUFFERS[self.dim]: whole_channels(support).channels}

    def take_file(self, positions: dict[str, Tensor], parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        own, other = BUFFERS[self.dim], BUFFERS[1 - self.dim]
        if other in positions:
            raise ValueError(
                f"layer {self.name}: the adapter file has {other} where this model's adapter trains {own}; load it "
                "with the adapter_config.json it was saved with"
            )
        found = self._required(values=parameters.get("values"), positions=positions.get(own))
        channels, values = found["positions"], found["values"]
        if channels.shape != (self.count,) or values.shape != shape_of(self.values):
            raise ValueError(
                f"layer {self.name}: the adapter file has {tuple(channels.shape)} {own} and {tuple(values.shape)} "
                f"values, where this model's adapter has {(self.count,)} and {tuple(shape_of(self.values))}; load it "
                "with the adapter_config.json it was saved with, on the base model it was made for"
            )
        check_dtype(values, "values", self.name)
        self.support_from(channels)  # refuses what does not fit
        check_values(values, self.name, "load")
        return {own: channels.to(torch.int32)}

    def extra_repr(self) -> str:
        return f"{BUFFERS[self.dim]}={self.count}, {super().extra_repr()}"
