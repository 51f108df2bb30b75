"""The set of trained positions of one weight matrix."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..constraints import Count, validated
from ..numerics.errors import layer_prefix
from ..numerics.panels import panels
from ..numerics.rng import sample_without_replacement
from ..numerics.sorted import among
from ..numerics.topk import topk_indices

INT32_LIMIT = 2**31
UINT16_LIMIT = 2**16
COORDINATE_BYTES = 2 * torch.int64.itemsize  # of a row and a column, from which a flat position is computed
# Entries that are addressed at a time on a CPU: their positions and the weight's lines, of 64 bytes for each, stay in
# its cache.
PIECE_ENTRIES = 2**13


def index_dtype(shape: Sequence[int]) -> torch.dtype:
    """The dtype of flat positions in a tensor of this shape: int32 below 2**31 entries, else int64.

    The number of entries, which ends the last row, has this dtype as well.

    Example:
        >>> from sparse_peft.support import index_dtype
        >>> index_dtype((4096, 4096)), index_dtype((65536, 65536))
        (torch.int32, torch.int64)
    """
    return torch.int32 if prod(shape) < INT32_LIMIT else torch.int64


def compact_layout(shape: Sequence[int], entries: int) -> tuple[tuple[int, torch.dtype], ...]:
    """The least memory that holds positions.

    Args:
        shape: ``(rows, cols)`` of the weight.
        entries: number of positions.

    Returns:
        ``(length, dtype)`` of the flat positions, or of the row pointers and of the columns, two bytes each where
        they can.
    """
    rows, cols = shape
    pointers = rows + 1, torch.int32 if entries < INT32_LIMIT else torch.int64
    columns = entries, torch.uint16 if cols <= UINT16_LIMIT else torch.int32
    flat = entries, index_dtype(shape)
    return min(((flat,), (pointers, columns)), key=layout_bytes)


def layout_bytes(layout: Iterable[tuple[int, torch.dtype]]) -> int:
    """Bytes of tensors of these lengths and dtypes."""
    return sum(length * dtype.itemsize for length, dtype in layout)


def _check_shape(shape: Sequence[int], name: str) -> tuple[int, int]:
    return _check_pair("shape", shape, "a matrix", name)


def _check_pair(field: str, pair: Sequence[int], what: str, name: str) -> tuple[int, int]:
    try:
        rows, cols = validated(field, pair, list[Count])
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{layer_prefix(name)}{field}={pair!r}: the (rows, cols) of {what}, both at least 1, are expected"
        ) from error
    return rows, cols


def _check_integers(indices: Tensor, what: str, name: str) -> None:
    if not isinstance(indices, Tensor):
        raise TypeError(f"{layer_prefix(name)}{what} of type {type(indices).__name__}: a tensor is expected")
    if indices.dtype == torch.bool or indices.is_floating_point() or indices.is_complex():
        cure = "use Support.from_mask for a mask" if indices.dtype == torch.bool else "convert them with .long()"
        raise TypeError(f"{layer_prefix(name)}{what} of dtype {indices.dtype}: integers are expected; {cure}")
    if indices.ndim != 1:
        raise ValueError(f"{layer_prefix(name)}{what} of shape {tuple(indices.shape)}: a 1-D tensor is expected")


def _check_range(indices: Tensor, size: int, what: str, extent: str, name: str) -> None:
    """Check integers of ``range(size)``; ``what`` and ``extent`` name them and the range in the message."""
    if indices.numel() == 0:
        return
    low, high = (int(bound) for bound in indices.aminmax())
    if low < 0 or high >= size:
        bad = low if low < 0 else high
        raise ValueError(
            f"{layer_prefix(name)}{what} contain {bad}, but {extent} has positions 0 to {size - 1}; they were "
            "made for a weight of another shape, or the file they come from is damaged"
        )


def check_indices(indices: Tensor, shape: tuple[int, int], name: str = "") -> None:
    """Check flat positions, for example of a file, against their weight.

    Args:
        indices: ``(entries,)`` flat row-major positions.
        shape: ``(rows, cols)`` of the weight as stored.
        name: the layer's name.

    Raises:
        TypeError: positions that are no integers.
        ValueError: positions that are not 1-D, out of range, not sorted or repeated.

    Example:
        >>> import torch
        >>> from sparse_peft.support import check_indices
        >>> check_indices(torch.tensor([0, 3, 7]), (2, 4))
    """
    rows, cols = _check_shape(shape, name)
    check_sorted(indices, rows * cols, "indices", f"a {rows} x {cols} weight", name)


def check_sorted(indices: Tensor, size: int, what: str, extent: str, name: str = "") -> None:
    """Check strictly increasing integers of ``range(size)``.

    Args:
        indices: ``(n,)`` integers.
        size: of the range.
        what: the integers in words, for the message.
        extent: the range in words, for the message.
        name: the layer's name.

    Raises:
        TypeError: values that are no integers.
        ValueError: values that are not 1-D, out of range, not sorted or repeated.
    """
    _check_integers(indices, what, name)
    _check_range(indices, size, what, extent, name)
    wrong = indices[1:] <= indices[:-1]
    if bool(wrong.any()):
        at = int(wrong.int().argmax()) + 1
        before, value = int(indices[at - 1]), int(indices[at])
        fault = f"{value} occurs twice" if value == before else f"{value} stands after {before}"
        cure = "Support.from_indices sorts" if what == "indices" else "sort"
        raise ValueError(
            f"{layer_prefix(name)}{what} must increase strictly, but {fault} (at position {at}); "
            f"{cure} positions that are in any order, and none may occur twice"
        )


def check_stored(shape: tuple[int, int], stored: tuple[Tensor, Tensor], name: str = "") -> None:
    """Check row pointers and columns against their weight.

    Args:
        shape: ``(rows, cols)`` of the weight as stored.
        stored: ``(rows + 1,)`` row pointers and ``(entries,)`` columns.
        name: the layer's name.

    Raises:
        ValueError: pointers or columns that are out of range, not sorted or repeated.
    """
    pointers, cols = stored[0], stored[1].to(torch.int32)
    counts = pointers.diff()
    if int(pointers[0]) != 0 or int(pointers[-1]) != cols.numel() or bool((counts < 0).any()):
        raise ValueError(
            f"{layer_prefix(name)}row pointers do not lead from 0 to {cols.numel()} entries; they were made for "
            "another weight, or the state that they come from is damaged"
        )
    _check_range(cols, shape[1], "columns", f"a {shape[0]} x {shape[1]} weight", name)
    check_indices(Support.of_stored(shape, stored).indices, shape, name)


class Support:
    """Positions of the trained entries of one weight matrix as it is stored.

    Positions are flat, row-major, sorted and unique. A support is immutable.

    Args:
        shape: ``(rows, cols)`` of the stored weight.
        indices: ``(entries,)`` integers, strictly increasing; stored as int32 where ``rows * cols < 2**31``, else
            as int64.
        validate: whether to check ``shape`` and ``indices``, which takes a pass over them and waits for their device.
        name: the layer's name, for error messages.

    Attributes:
        shape: ``(rows, cols)``.
        name: the layer's name.

    Raises:
        TypeError: indices that are no integers.
        ValueError: indices that are out of range, not sorted or repeated.

    Example:
        >>> import torch
        >>> from sparse_peft.support import Support
        >>> support = Support.from_scores(torch.tensor([[1.0, 5.0], [4.0, 2.0]]), k=2)
        >>> support.indices.tolist()
        [1, 2]
    """

    shape: tuple[int, int]
    name: str
    # flat positions, or row pointers and columns
    _flat: Tensor | None = None
    _row_ptr: Tensor | None = None
    _cols: Tensor | None = None

    def __init__(self, shape: tuple[int, int], indices: Tensor, *, validate: bool = True, name: str = ""):
        self.shape = shape
        if validate:
            self.shape = _check_shape(shape, name)
            check_indices(indices, self.shape, name)
        self.name = name
        self._flat = indices.to(index_dtype(self.shape))

    @property
    def indices(self) -> Tensor:
        """``(entries,)`` flat positions, ascending; computed where rows and columns are kept, see ``compact``."""
        flat = self._flat
        return flat if flat is not None else self._computed("indices", self._narrow_flat)

    @property
    def nnz(self) -> int:
        """Number of entries."""
        return self._stored.numel()

    @property
    def density(self) -> float:
        """Share of the weight's entries in the support."""
        return self.nnz / (self.shape[0] * self.shape[1])

    @property
    def device(self) -> torch.device:
        """Device of the positions."""
        return self._stored.device

    @property
    def row_ptr(self) -> Tensor:
        """``(rows + 1,)`` CSR row pointers: entries ``row_ptr[i]`` to ``row_ptr[i + 1]`` lie in row ``i``."""
        return self._row_ptr if self._row_ptr is not None else self._computed("row_ptr", self._pointers)

    @property
    def cols(self) -> Tensor:
        """``(entries,)`` int32 column of each entry."""
        cols = self._cols
        return cols if cols is not None and cols.dtype == torch.int32 else self._computed("cols", self._wide_cols)

    def cols_of(self, entries: Tensor) -> Tensor:
        """``(chosen,)`` int64 columns of some entries, given by their numbers ``(chosen,)``."""
        if self._cols is None:
            return self.indices.index_select(0, entries).long() % self.shape[1]
        if self._cols.dtype != torch.uint16:
            return self._cols.index_select(0, entries).long()
        # torch selects no unsigned numbers, but their bits
        return self._cols.view(torch.int16).index_select(0, entries).view(torch.uint16).long()

    @property
    def rows(self) -> Tensor:
        """``(entries,)`` int32 row of each entry."""
        if self._cols is not None:
            return self._coordinates(out_int32=True)[0]
        return torch.div(self.indices, self.shape[1], rounding_mode="floor").to(torch.int32)

    # ------------------------------------------------------------------ how positions are stored

    @property
    def stored(self) -> tuple[Tensor, ...]:
        """The positions as they are kept: ``(indices,)``, or ``(row_ptr, cols)``; ``of_stored`` takes them."""
        return (self.indices,) if self._cols is None else (self.row_ptr, self._cols)

    @property
    def _stored(self) -> Tensor:
        """A tensor that has a number for each entry."""
        stored = self._flat if self._cols is None else self._cols
        assert stored is not None
        return stored

    @classmethod
    def of_stored(cls, shape: tuple[int, int], stored: Sequence[Tensor], name: str = "") -> Support:
        """The support of what ``stored`` returns; nothing is checked or copied.

        Args:
            shape: ``(rows, cols)`` of the stored weight.
            stored: ``(indices,)``, or ``(row_ptr, cols)``: int32 or int64, and uint16 or int32.
            name: the layer's name.
        """
        support = cls.__new__(Support)
        support.shape, support.name = shape, name
        if len(stored) == 1:
            support._flat = stored[0]
        else:
            support._row_ptr, support._cols = stored
        return support

    def compact(self) -> Support:
        """The same positions in the least memory: two bytes an entry and four a row, or flat where that is less.

        Flat positions are then computed whenever they are asked for, and kept on a GPU only, whose kernels address
        weights by them.
        """
        layout = compact_layout(self.shape, self.nnz)
        if [tensor.dtype for tensor in self.stored] == [dtype for _, dtype in layout]:
            return self
        if len(layout) == 1:
            return Support.of_stored(self.shape, (self.indices,), self.name)
        found = self.row_ptr.to(layout[0][1]), self.cols.to(layout[1][1])
        return Support.of_stored(self.shape, found, self.name)

    def __getstate__(self) -> dict[str, Any]:
        """Of memory of its own: torch saves no two tensors that view one buffer as numbers of two kinds."""
        state = {name: value for name, value in self.__dict__.items() if name != "derived"}
        state |= {name: state[name].clone() for name in ("_row_ptr", "_cols") if name in state}
        if "_cols" in state and state["_cols"].dtype == torch.uint16:
            state["_cols"] = state["_cols"].view(torch.int16)  # pickle, in torch, reads no unsigned numbers again
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._cols is not None and self._cols.dtype == torch.int16:
            self._cols = self._cols.view(torch.uint16)

    def _computed(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """What is computed from the positions; kept on a GPU."""
        if self.device.type == "cpu":
            return compute()
        if name not in self.derived:
            self.derived[name] = compute()
        return self.derived[name]

    def _pointers(self) -> Tensor:
        (rows, cols), indices = self.shape, self.indices
        starts = torch.arange(rows + 1, dtype=torch.int64, device=indices.device).mul_(cols).to(indices.dtype)
        return torch.searchsorted(indices, starts, out_int32=indices.numel() < INT32_LIMIT)

    def _wide_cols(self) -> Tensor:
        return (self.indices % self.shape[1] if self._cols is None else self._cols).to(torch.int32)

    def _narrow_flat(self) -> Tensor:
        rows, cols = self._coordinates(out_int32=index_dtype(self.shape) == torch.int32).unbind()
        return cols.add_(rows, alpha=self.shape[1])

    def _coordinates(self, out_int32: bool = False) -> Tensor:
        """``(2, entries)`` rows and columns, from row pointers and columns."""
        assert self._cols is not None
        pointers, cols = self.row_ptr, self._cols.to(self.row_ptr.dtype)
        if torch.compiler.is_compiling():  # torch's conversion has no symbolic sizes
            numbers = torch.arange(self.shape[0], dtype=cols.dtype, device=cols.device)
            rows = torch.repeat_interleave(numbers, pointers.diff(), output_size=cols.shape[0])
            return torch.stack((rows, cols)).to(torch.int32 if out_int32 else torch.int64)
        return torch._convert_indices_from_csr_to_coo(pointers, cols, out_int32=out_int32)

    def _flatten(self) -> Tensor:
        """Flat positions as a new int64 tensor."""
        if self._cols is None:
            return self.indices.long()
        rows, cols = self._coordinates().unbind()
        return cols.add_(rows, alpha=self.shape[1])

    def flat_in_one_piece(self) -> Tensor | None:
        """``(entries,)`` int64 flat positions, where they are few enough for one of ``flat_pieces``; else None."""
        return self._flatten() if len(self._pieces()) <= 1 else None

    def flat_pieces(self) -> Iterator[tuple[int, int, Tensor]]:
        """``(first, last, flat positions of these entries)``, int64 and of at most a panel's size."""
        pieces = self._pieces()
        if len(pieces) <= 1:
            yield 0, self.nnz, self._flatten()
        elif self._cols is None:
            for first, last in pieces:
                yield first, last, self.indices[first:last].long()
        else:
            yield from self._coordinate_pieces(pieces)

    def _pieces(self) -> list[tuple[int, int]]:
        # the rows of pieces are numbers that a graph does not know
        is_divided = self.device.type == "cpu" and not torch.compiler.is_compiling()
        return panels(self.nnz, COORDINATE_BYTES, PIECE_ENTRIES if is_divided else None)

    def _coordinate_pieces(self, pieces: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, Tensor]]:
        """``flat_pieces`` of row pointers and columns; the entries of one row may lie in several."""
        assert self._cols is not None
        pointers, cols = self.row_ptr, self.shape[1]
        bounds = torch.tensor([first for first, _ in pieces] + [self.nnz], dtype=pointers.dtype, device=self.device)
        # the row of a piece's first entry, and the row after that of its last one
        starts = torch.searchsorted(pointers, bounds[:-1], right=True).sub_(1).tolist()
        stops = torch.searchsorted(pointers, bounds[1:]).tolist()
        length = torch.tensor([cols], device=self.device)
        for (first, last), start, stop in zip(pieces, starts, stops, strict=True):
            # each row's start is so many positions after the one before: twice as fast as numbering the rows
            flat = torch.zeros(last - first, dtype=torch.int64, device=self.device)
            begins = pointers[start + 1 : stop].sub(first)
            flat.index_add_(0, begins, length.expand(begins.numel()))
            yield first, last, torch.cumsum(flat, 0, out=flat).add_(self._cols[first:last].long()).add_(start * cols)

    def entry_ranges(self, row_ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """The half-open range of entries in each of several consecutive ranges of rows.

        Waits for the device at the first call with these ranges.
        """
        key = tuple(row_ranges)
        if key not in self._entry_ranges:
            bounds = [start for start, _ in row_ranges] + [stop for _, stop in row_ranges[-1:]]
            offsets = self.row_ptr[bounds].tolist()
            self._entry_ranges[key] = list(itertools.pairwise(offsets))
        return self._entry_ranges[key]

    def ranges_of_rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The half-open ranges of entries in rows, at a cost that does not depend on the weight's number of rows.

        Args:
            rows: ``(n,)`` int64, in any order; rows may repeat.

        Returns:
            ``(first, last)``, each ``(n,)`` int64.
        """
        if self._row_ptr is not None:
            return self._row_ptr.index_select(0, rows).long(), self._row_ptr.index_select(0, rows + 1).long()
        flat, starts = self.indices, rows * self.shape[1]
        bounds = torch.stack((starts, starts + self.shape[1])).to(flat.dtype)
        first, last = torch.searchsorted(flat, bounds).unbind()
        return first, last

    def of_rows(self, start: int, stop: int) -> tuple[Support, int, int]:
        """The part in rows ``start`` to ``stop`` as a support of these rows, and the range of its entries."""
        ((first, last),) = self.entry_ranges([(start, stop)])
        return self.part(start, stop, first, last), first, last

    def part(self, start: int, stop: int, first: int, last: int) -> Support:
        """The part in rows ``start`` to ``stop`` as a support of these rows, where its range of entries is known."""
        if stop - start == self.shape[0]:
            return self
        shape = stop - start, self.shape[1]
        if self._cols is None:
            return Support(shape, self.indices[first:last] - start * shape[1], validate=False, name=self.name)
        pointers = self.row_ptr[start : stop + 1] - first
        return Support.of_stored(shape, (pointers, self._stored[first:last]), self.name)

    def of_columns(self, start: int, stop: int) -> tuple[Support, Tensor]:
        """The part in columns ``start`` to ``stop`` as a support of these columns, and its entries' int64 slots."""
        slots = ((self.cols >= start) & (self.cols < stop)).nonzero().squeeze(1)
        shape = (self.shape[0], stop - start)
        flat = self.rows[slots].long() * shape[1] + (self.cols[slots] - start)
        return Support(shape, flat, validate=False, name=self.name), slots

    @cached_property
    def _entry_ranges(self) -> dict[tuple[tuple[int, int], ...], list[tuple[int, int]]]:
        return {}

    @cached_property
    def derived(self) -> dict[str, Any]:
        """Results that other modules compute once from this support, by name."""
        return {}

    @cached_property
    def transposed(self) -> tuple[Support, Tensor]:
        """The support of the transposed weight, and the int64 slot of each of its entries in this support."""
        rows, cols = self.shape
        flat, order = (self.cols.long() * rows + self.rows).sort()
        return Support((cols, rows), flat, validate=False, name=self.name).compact(), order

    # ------------------------------------------------------------------ constructors

    @classmethod
    def from_indices(cls, shape: tuple[int, int], indices: Tensor, name: str = "") -> Support:
        """Flat positions in any order.

        Raises:
            TypeError, ValueError: positions that are no integers, out of range or repeated.
        """
        _check_integers(indices, "indices", name)
        return cls(shape, indices.sort().values, name=name)

    @classmethod
    def from_mask(cls, mask: Tensor, name: str = "") -> Support:
        """The true entries of a bool mask ``(rows, cols)``.

        Raises:
            TypeError: the mask is not bool.
            ValueError: it is not 2-D.
        """
        if mask.dtype != torch.bool:
            raise TypeError(
                f"{layer_prefix(name)}mask of dtype {mask.dtype}: a bool mask is expected, such as `mask != 0`"
            )
        shape = _check_shape(mask.shape, name)
        return cls(shape, mask.reshape(-1).nonzero().squeeze(1), validate=False, name=name)

    @classmethod
    def from_rows(cls, shape: tuple[int, int], rows: Tensor | Sequence[int], name: str = "") -> Support:
        """All entries of some rows, given in any order.

        Raises:
            TypeError, ValueError: rows that are no integers, out of range or repeated.
        """
        shape = _check_shape(shape, name)
        rows = _sorted_unique(rows, shape[0], "rows", f"a {shape[0]} x {shape[1]} weight", name)
        cols = torch.arange(shape[1], device=rows.device)
        return cls(shape, (rows[:, None] * shape[1] + cols).reshape(-1), validate=False, name=name)

    @classmethod
    def from_columns(cls, shape: tuple[int, int], cols: Tensor | Sequence[int], name: str = "") -> Support:
        """All entries of some columns, given in any order.

        Raises:
            TypeError, ValueError: columns that are no integers, out of range or repeated.
        """
        shape = _check_shape(shape, name)
        cols = _sorted_unique(cols, shape[1], "cols", f"a {shape[0]} x {shape[1]} weight", name)
        starts = torch.arange(shape[0], device=cols.device) * shape[1]
        return cls(shape, (starts[:, None] + cols).reshape(-1), validate=False, name=name)

    @classmethod
    def from_blocks(
        cls,
        shape: tuple[int, int],
        block_size: tuple[int, int],
        block_ids: Tensor | Sequence[int],
        name: str = "",
    ) -> Support:
        """All entries of some blocks, given in any order.

        Args:
            shape: ``(rows, cols)`` of the stored weight.
            block_size: ``(rows, cols)`` of a block; blocks at the right and lower edge may be smaller.
            block_ids: row-major block numbers in the grid of ``ceil(rows / block rows)`` by
                ``ceil(cols / block cols)``.
            name: the layer's name.

        Raises:
            TypeError, ValueError: blocks that are no integers, out of range or repeated, or a bad block size.
        """
        rows, cols = shape = _check_shape(shape, name)
        height, width = _check_pair("block_size", block_size, "a block", name)
        grid = -(-rows // height), -(-cols // width)
        extent = f"a grid of {grid[0]} x {grid[1]} blocks"
        ids = _sorted_unique(block_ids, grid[0] * grid[1], "block_ids", extent, name)
        row = (ids // grid[1] * height)[:, None, None] + torch.arange(height, device=ids.device)[:, None]
        col = (ids % grid[1] * width)[:, None, None] + torch.arange(width, device=ids.device)
        inside = (row < rows) & (col < cols)
        return cls(shape, (row * cols + col)[inside].sort().values, validate=False, name=name)

    @classmethod
    def random(cls, shape: tuple[int, int], k: int, *, seed: int, name: str, among: Tensor | None = None) -> Support:
        """``k`` positions that depend on ``seed``, ``name``, the shape and ``among`` alone, on the CPU.

        Args:
            shape: ``(rows, cols)`` of the stored weight.
            k: number of positions.
            seed: any int.
            name: the layer's name.
            among: ``(rows, cols)`` bool, the entries to draw from; None for all.

        Raises:
            TypeError, ValueError: ``k`` or ``seed`` is no int, or ``k`` is out of range.
        """
        rows, cols = _check_shape(shape, name)
        if among is None:
            drawn = sample_without_replacement(rows * cols, k, seed=seed, name=name)
            return cls((rows, cols), drawn, validate=False, name=name)
        pool = cls.from_mask(among.cpu(), name).indices
        if k > pool.numel():
            raise ValueError(
                f"{layer_prefix(name)}k={k}: {pool.numel()} of the {rows * cols} entries are eligible, the others "
                "are zero; the weight is not the one they were counted in, or the budget is too large"
            )
        return cls((rows, cols), pool[sample_without_replacement(pool.numel(), k, seed=seed, name=name)], name=name)

    @classmethod
    def from_scores(cls, scores: Tensor, k: int, largest: bool = True, name: str = "") -> Support:
        """The ``k`` largest (or smallest) of scores ``(rows, cols)``; among equal ones the lowest positions.

        Raises:
            ValueError: NaN scores, scores that are not 2-D, or ``k`` out of range.
        """
        shape = _check_shape(scores.shape, name)
        return cls(shape, topk_indices(scores.reshape(-1), k, largest, name=name), validate=False, name=name)

    # ------------------------------------------------------------------ views

    def to_mask(self) -> Tensor:
        """The support as a bool mask ``(rows, cols)``."""
        mask = torch.zeros(self.shape[0] * self.shape[1], dtype=torch.bool, device=self.device)
        return mask.index_fill_(0, self.indices.long(), True).view(self.shape)

    def to(self, device: torch.device | str) -> Support:
        """The same support on another device; itself if it is there already."""
        stored = tuple(tensor.to(device) for tensor in self.stored)
        return self if stored[-1] is self.stored[-1] else Support.of_stored(self.shape, stored, self.name)

    # ------------------------------------------------------------------ sets

    def contains(self, flat: Tensor) -> Tensor:
        """Whether each of the flat positions ``flat``, of any shape, is in the support: bool of ``flat``'s shape."""
        # clamped, since a wider number could wrap to one in the support; the comparison below rejects it
        inside = flat.long().clamp(0, self.shape[0] * self.shape[1] - 1).to(self.indices.dtype)
        return among(inside, self.indices) & (inside == flat)

    def slots(self, flat: Tensor) -> Tensor:
        """Index of each position ``flat`` in the support, int64; all must be in it."""
        return torch.searchsorted(self.indices, flat.to(self.indices.dtype))

    def union(self, *others: Support) -> tuple[Support, list[Tensor]]:
        """The union with other supports of the same weight.

        Returns:
            The union, and the int64 slots of this support's and each other support's entries in the union.

        Raises:
            ValueError: supports of weights of other shapes.
        """
        parts = (self, *others)
        for other in others:
            self._check_same_shape(other)
        joined = torch.cat([part.indices.to(self.device) for part in parts]).unique(sorted=True)
        union = Support(self.shape, joined, validate=False, name=self.name)
        return union, [union.slots(part.indices.to(self.device)) for part in parts]

    def free(self, entries: int) -> Support:
        """The lowest positions outside of the support, as many of them.

        Raises:
            ValueError: the weight has not so many.
        """
        most = self.shape[0] * self.shape[1]
        return Support(self.shape, self._lowest_outside(self.indices, entries, most), validate=False, name=self.name)

    def _lowest_outside(self, taken: Tensor, count: int, size: int) -> Tensor:
        """The lowest ``count`` numbers of ``range(size)`` that are not among the sorted ``taken``."""
        if count < 0 or taken.numel() + count > size:
            raise ValueError(
                f"{layer_prefix(self.name)}{count} free places of {size}, of which {taken.numel()} are taken, are "
                f"wanted; at most {size - taken.numel()} are there"
            )
        lowest = torch.arange(taken.numel() + count, dtype=taken.dtype, device=taken.device)
        return lowest[~torch.isin(lowest, taken)][:count]

    def intersection_size(self, other: Support) -> int:
        """Number of common positions.

        Raises:
            ValueError: supports of weights of other shapes.
        """
        self._check_same_shape(other)
        return int(self.contains(other.indices.to(self.device)).sum())

    def _check_same_shape(self, other: Support) -> None:
        if other.shape != self.shape:
            raise ValueError(
                f"{layer_prefix(self.name)}supports over {self.shape} and {other.shape} ({other.name or 'unnamed'}) "
                "belong to different weights"
            )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Support):
            return NotImplemented
        return self.shape == other.shape and torch.equal(self.indices, other.indices.to(self.device))

    def __repr__(self) -> str:
        name = f"{self.name!r}, " if self.name else ""
        return f"Support({name}shape={self.shape}, nnz={self.nnz}, density={self.density:.3g}, device={self.device})"


def _sorted_unique(ids: Tensor | Sequence[int], size: int, what: str, extent: str, name: str) -> Tensor:
    """Row, column or block numbers as sorted int64, checked; see ``_check_range``."""
    if not isinstance(ids, Tensor):
        ids = torch.tensor(ids, dtype=None if len(ids) else torch.int64)
    _check_integers(ids, what, name)
    _check_range(ids, size, what, extent, name)
    ids = ids.long().sort().values
    repeated = ids[1:][ids[1:] == ids[:-1]]
    if repeated.numel():
        raise ValueError(f"{layer_prefix(name)}{what} contain {int(repeated[0])} twice; each may be given once")
    return ids
