"""Supports of whole rows or columns of a weight: the output or input channels of a layer.

An input channel of a convolution's weight, viewed as ``(out, in * taps)``, is ``taps`` columns wide. The channel
numbers define the support, so positions of entries are computed only on demand.
"""

from __future__ import annotations

from functools import cached_property
from typing import TypeGuard

import torch
from torch import Tensor

from ..numerics.errors import layer_prefix
from .support import Support, check_sorted, index_dtype


class ChannelSupport(Support):
    """All entries of some rows (``dim=0``) or columns (``dim=1``) of one weight matrix as it is stored.

    The values of its entries, in the order of positions, are the matrix ``(channels, cols)`` or
    ``(rows, channels * width)`` in row-major order.

    Args:
        shape: ``(rows, cols)`` of the stored weight.
        dim: 0 for rows, 1 for columns.
        channels: ``(count,)`` integers, strictly increasing.
        width: columns per channel; 1 for rows.
        validate: whether to check ``channels``.
        name: the layer's name, for error messages.

    Attributes:
        channels: ``(count,)`` int32.

    Raises:
        TypeError: channels that are no integers.
        ValueError: channels that are out of range, not sorted or repeated.

    Example:
        >>> import torch
        >>> from sparse_peft.support import ChannelSupport
        >>> support = ChannelSupport((4, 3), dim=0, channels=torch.tensor([1]))
        >>> support.indices.tolist()
        [3, 4, 5]
    """

    def __init__(
        self,
        shape: tuple[int, int],
        dim: int,
        channels: Tensor,
        width: int = 1,
        *,
        validate: bool = True,
        name: str = "",
    ):
        if dim not in (0, 1) or shape[1] % width or (dim == 0 and width != 1):
            raise ValueError(f"dim={dim!r} and width={width!r} do not divide a weight of {shape[0]} x {shape[1]}")
        self.shape, self.name = (int(shape[0]), int(shape[1])), name
        self.dim, self.width = dim, width
        if validate:
            kind = ("rows", "columns")[dim] if width == 1 else "input channels"
            check_sorted(channels, self.size, kind, f"a {shape[0]} x {shape[1]} weight", name)
        self.channels = channels.to(torch.int32)

    @property
    def size(self) -> int:
        """Number of channels that the weight has along ``dim``."""
        return self.shape[0] if self.dim == 0 else self.shape[1] // self.width

    @property
    def count(self) -> int:
        """Number of channels that train."""
        return self.channels.numel()

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Shape of the values as a matrix."""
        rows, cols = self.shape
        return (self.count, cols) if self.dim == 0 else (rows, self.count * self.width)

    @property
    def nnz(self) -> int:
        rows, cols = self.matrix_shape
        return rows * cols

    @property
    def device(self) -> torch.device:
        return self.channels.device

    @cached_property
    def lines(self) -> Tensor:
        """The rows or columns of the channels, int64."""
        channels = self.channels.long()
        if self.width == 1:
            return channels
        return (channels[:, None] * self.width + torch.arange(self.width, device=self.device)).reshape(-1)

    @property
    def indices(self) -> Tensor:
        """``(entries,)`` flat positions, computed whenever they are asked for."""
        rows, cols = self.shape
        if self.dim == 0:
            flat = self.lines[:, None] * cols + torch.arange(cols, device=self.device)
        else:
            flat = torch.arange(rows, device=self.device)[:, None] * cols + self.lines
        return flat.reshape(-1).to(index_dtype(self.shape))

    def to(self, device: torch.device | str) -> ChannelSupport:
        channels = self.channels.to(device)
        if channels is self.channels:
            return self
        return ChannelSupport(self.shape, self.dim, channels, self.width, validate=False, name=self.name)

    def of_rows(self, start: int, stop: int) -> tuple[Support, int, int]:
        shape, channels = (stop - start, self.shape[1]), self.channels
        if self.dim == 1:
            entries = self.count * self.width
            part = ChannelSupport(shape, 1, channels, self.width, validate=False, name=self.name)
            return part, start * entries, stop * entries
        first, last = torch.searchsorted(channels, channels.new_tensor([start, stop])).tolist()
        part = ChannelSupport(shape, 0, channels[first:last] - start, validate=False, name=self.name)
        return part, first * shape[1], last * shape[1]

    def of_columns(self, start: int, stop: int) -> tuple[Support, Tensor]:
        if self.width > 1:
            return super().of_columns(start, stop)
        shape, channels, place = (
            (self.shape[0], stop - start),
            self.channels,
            torch.arange(self.nnz, device=self.device),
        )
        place = place.view(self.matrix_shape)
        if self.dim == 0:
            return ChannelSupport(shape, 0, channels, validate=False, name=self.name), place[:, start:stop].reshape(-1)
        first, last = torch.searchsorted(channels, channels.new_tensor([start, stop])).tolist()
        part = ChannelSupport(shape, 1, channels[first:last] - start, validate=False, name=self.name)
        return part, place[:, first:last].reshape(-1)

    def union(self, *others: Support) -> tuple[Support, list[Tensor]]:
        for other in others:
            self._check_same_shape(other)
        parts = [self, *(other for other in others if self._is_alike(other))]
        if len(parts) < 1 + len(others):
            return super().union(*others)
        joined = torch.cat([part.channels.to(self.device) for part in parts]).unique(sorted=True)
        union = ChannelSupport(self.shape, self.dim, joined, self.width, validate=False, name=self.name)
        place = torch.arange(union.nnz, device=self.device).view(union.matrix_shape)
        slots = []
        for part in parts:
            where = torch.searchsorted(union.lines, part.lines.to(self.device))
            slots.append(place.index_select(self.dim, where).reshape(-1))
        return union, slots

    def free(self, entries: int) -> ChannelSupport:
        """The lowest channels outside of the support, with as many entries.

        Raises:
            ValueError: no whole number of channels has so many entries, or the weight has not so many channels.
        """
        each = self.shape[1] if self.dim == 0 else self.shape[0] * self.width
        if entries % each:
            raise ValueError(f"{layer_prefix(self.name)}{entries} entries: a channel has {each}")
        channels = self._lowest_outside(self.channels, entries // each, self.size)
        return ChannelSupport(self.shape, self.dim, channels, self.width, validate=False, name=self.name)

    def _is_alike(self, other: object) -> TypeGuard[ChannelSupport]:
        """Whether the other support is of channels of the same dimension and width."""
        return isinstance(other, ChannelSupport) and (other.dim, other.width) == (self.dim, self.width)

    def __eq__(self, other: object) -> bool:
        if self._is_alike(other):
            return self.shape == other.shape and torch.equal(self.channels, other.channels.to(self.device))
        return super().__eq__(other)

    def __repr__(self) -> str:
        name = f"{self.name!r}, " if self.name else ""
        kind = "rows" if self.dim == 0 else "columns"
        return f"ChannelSupport({name}shape={self.shape}, {kind}={self.count}, density={self.density:.3g})"


class ExpertColumns(Support):
    """All entries of some columns of each of several matrices that are stored one above the other.

    Column ``c`` of matrix ``m`` has the number ``m * cols + c``. The values of a matrix's entries, in the order of
    positions, are ``(rows of the matrix, its columns that train)`` in row-major order.

    Args:
        shape: ``(matrices * rows, cols)`` of the stored weight.
        matrices: their number.
        channels: ``(count,)`` integers, strictly increasing.
        validate: whether to check ``channels``.
        name: the layer's name, for error messages.

    Attributes:
        channels: ``(count,)`` int32.

    Raises:
        TypeError: channels that are no integers.
        ValueError: channels that are out of range, not sorted or repeated, or rows that the matrices do not share.

    Example:
        >>> import torch
        >>> from sparse_peft.support import ExpertColumns
        >>> ExpertColumns((4, 3), matrices=2, channels=torch.tensor([0, 5])).indices.tolist()
        [0, 3, 8, 11]
    """

    dim, width = 1, 1

    def __init__(
        self, shape: tuple[int, int], matrices: int, channels: Tensor, *, validate: bool = True, name: str = ""
    ):
        self.shape, self.matrices, self.name = (int(shape[0]), int(shape[1])), matrices, name
        if shape[0] % matrices:
            raise ValueError(f"{shape[0]} rows are not those of {matrices} matrices of equal size")
        if validate:
            check_sorted(channels, self.size, "columns", f"{matrices} matrices of {shape[1]} columns", name)
        self.channels = channels.to(torch.int32)

    @property
    def size(self) -> int:
        """Number of columns of all matrices."""
        return self.matrices * self.shape[1]

    @property
    def height(self) -> int:
        """Rows of one matrix."""
        return self.shape[0] // self.matrices

    @property
    def count(self) -> int:
        """Number of columns that train."""
        return self.channels.numel()

    @property
    def nnz(self) -> int:
        return self.count * self.height

    @property
    def device(self) -> torch.device:
        return self.channels.device

    @property
    def indices(self) -> Tensor:
        """``(entries,)`` flat positions, computed whenever they are asked for."""
        channels, cols = self.channels.long(), self.shape[1]
        rows = torch.div(channels, cols, rounding_mode="floor") * self.height
        rows = rows + torch.arange(self.height, device=self.device)[:, None]
        return (rows * cols + channels % cols).reshape(-1).sort().values.to(index_dtype(self.shape))

    def to(self, device: torch.device | str) -> ExpertColumns:
        channels = self.channels.to(device)
        if channels is self.channels:
            return self
        return ExpertColumns(self.shape, self.matrices, channels, validate=False, name=self.name)

    def of_rows(self, start: int, stop: int) -> tuple[Support, int, int]:
        number, cols = start // self.height, self.shape[1]
        if (start, stop) != (number * self.height, (number + 1) * self.height):
            return super().of_rows(start, stop)
        bounds = self.channels.new_tensor([number * cols, (number + 1) * cols])
        first, last = torch.searchsorted(self.channels, bounds).tolist()
        channels = self.channels[first:last] - number * cols
        part = ChannelSupport((self.height, cols), 1, channels, validate=False, name=self.name)
        return part, first * self.height, last * self.height

    def union(self, *others: Support) -> tuple[Support, list[Tensor]]:
        for other in others:
            self._check_same_shape(other)
        alike = [other for other in others if isinstance(other, ExpertColumns) and other.matrices == self.matrices]
        if len(alike) < len(others):
            return super().union(*others)
        parts = [self, *(other.to(self.device) for other in alike)]
        channels = torch.cat([part.channels for part in parts]).unique(sorted=True)
        union = ExpertColumns(self.shape, self.matrices, channels, validate=False, name=self.name)
        return union, [torch.searchsorted(union.indices, part.indices) for part in parts]

    def free(self, entries: int) -> ExpertColumns:
        """The lowest columns outside of the support, with as many entries.

        Raises:
            ValueError: no whole number of columns has so many entries, or the weight has not so many.
        """
        if entries % self.height:
            raise ValueError(f"{layer_prefix(self.name)}{entries} entries: a column has {self.height}")
        channels = self._lowest_outside(self.channels, entries // self.height, self.size)
        return ExpertColumns(self.shape, self.matrices, channels, validate=False, name=self.name)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, ExpertColumns) and other.matrices == self.matrices:
            return self.shape == other.shape and torch.equal(self.channels, other.channels.to(self.device))
        return super().__eq__(other)

    def __repr__(self) -> str:
        name = f"{self.name!r}, " if self.name else ""
        return (
            f"ExpertColumns({name}shape={self.shape}, matrices={self.matrices}, columns={self.count}, "
            f"density={self.density:.3g})"
        )
