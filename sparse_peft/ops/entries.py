"""Reading and writing a weight at flat positions, or at a [`Support`][sparse_peft.support.Support].

The effective entry is ``round(original + value)``: the sum is formed in the wider of the two dtypes and rounded once
to the weight's. Training, merging and a reloaded adapter therefore give the same bits.

A support of single entries is addressed by its flat positions, a support of whole channels by slices. Values have the
order of the positions. A weight may have more than two dimensions, as in a convolution: positions then belong to its
matrix ``(out, everything else)``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..numerics.panels import panels
from ..support import ChannelSupport, Support
from . import cuda_kernels, triton_kernels
from .backends import forced_backend, kernel_backend, kernels_possible

UNSCALED: Iterable[float] = itertools.repeat(1.0)

# ---------------------------------------------------------------------------------------------------- flat positions


def read_entries(weight: Tensor, indices: Tensor, out: Tensor | None = None) -> Tensor:
    """The weight's entries at flat row-major ``indices``: ``(entries,)`` of its dtype, new or written to ``out``."""
    if weight.is_contiguous():
        return torch.index_select(weight.view(-1), 0, indices, out=out)
    entries = weight[torch.unravel_index(indices.long(), weight.shape)]
    return entries if out is None else out.copy_(entries)


def write_entries_(weight: Tensor, indices: Tensor, entries: Tensor) -> None:
    """Overwrite the weight's entries at flat row-major ``indices``, in place; all others keep their bits."""
    bounds = panels(indices.numel(), torch.int64.itemsize)
    _write_pieces_(weight, ((start, stop, indices[start:stop].long()) for start, stop in bounds), entries)


def _write_pieces_(weight: Tensor, pieces: Iterable[tuple[int, int, Tensor]], entries: Tensor) -> None:
    """Overwrite entries whose positions come in pieces of at most a panel: ``(first, last, int64 positions)``."""
    weight, entries = weight.detach(), entries.detach()
    for first, last, piece in pieces:
        load_piece(weight, piece)
        write_piece_(weight, piece, entries[first:last])


def load_piece(weight: Tensor, piece: Tensor) -> None:
    """Bring entries into a CPU's cache before they are overwritten.

    A CPU waits for many reads at once, and for few writes to lines outside of its cache: this takes a third of the
    time that it saves.
    """
    if weight.is_cpu and weight.is_contiguous():
        weight.view(-1).index_select(0, piece)


def write_piece_(weight: Tensor, piece: Tensor, entries: Tensor) -> None:
    """``write_entries_`` at few positions, in int64."""
    # on a CPU in bfloat16 three times as fast as scatter_; it takes int64 positions only
    if weight.is_contiguous():
        weight.view(-1).index_copy_(0, piece, entries)
    else:
        weight[torch.unravel_index(piece, weight.shape)] = entries


def effective_entries(originals: Tensor, values: Tensor, scale: float = 1.0) -> Tensor:
    """``round(original + scale * value)`` in the originals' dtype, ``(entries,)``."""
    if scale == 1:
        total = originals + values
    elif math.frexp(scale)[0] == 0.5:  # a power of two, by which a product is not rounded
        total = torch.add(originals, values, alpha=scale)
    else:
        total = originals + values * scale
    return total if total.dtype == originals.dtype else total.to(originals.dtype)


def _kernel_for(op: str, weight: Tensor, indices: Tensor, values: Tensor | None) -> str | None:
    """The kernel backend for these tensors; None for PyTorch's operations, which take all tensors."""
    if not weight.is_contiguous() or not indices.is_contiguous() or indices.numel() == 0:
        return None
    if values is not None and not (values.dtype == torch.float32 and values.is_contiguous()):
        return None
    return kernel_backend(op, weight.dtype, weight.device, indices.dtype)


def scatter_add_(weight: Tensor, indices: Tensor, values: Tensor) -> None:
    """``weight.flat[indices] = round(weight.flat[indices] + values)``, in place and rounded once.

    Args:
        weight: ``(rows, cols)`` floats.
        indices: ``(entries,)`` flat row-major positions, each at most once, so the order does not matter.
        values: ``(entries,)`` floats.
    """
    kernel = _kernel_for("scatter_add", weight, indices, values)
    if kernel is None:
        write_entries_(weight, indices, effective_entries(read_entries(weight.detach(), indices), values.detach()))
        return
    kernels = cuda_kernels if kernel == "cuda" else triton_kernels.kernels("entries")
    kernels.scatter_add_(weight, indices, values)
    increment_version(weight)


# ------------------------------------------------------------------------------------------ many weights in one launch

Mode = Literal["take", "resync", "restore"]


class _Write(NamedTuple):
    """One weight whose entries are read or written.

    Attributes:
        mode: ``"take"`` reads the originals from the weight, ``"restore"`` writes them, ``"resync"`` writes their
            sums with the values.
        weight: the base weight.
        indices: ``(entries,)`` flat positions.
        originals: ``(entries,)`` in the weight's dtype.
        values: ``(entries,)`` deltas, for ``"resync"``.
    """

    mode: Mode
    weight: Tensor
    indices: Tensor
    originals: Tensor
    values: Tensor | None = None

    def kernel(self) -> str | None:
        """The kernel backend that takes these tensors."""
        if not self.originals.is_contiguous():
            return None
        return _kernel_for("write_many", self.weight, self.indices, self.values)

    def run(self) -> None:
        """Read or write with PyTorch's operations."""
        if self.indices.numel() == 0:
            return
        if self.mode == "take":
            read_entries(self.weight.detach(), self.indices, out=self.originals)
            return
        entries = self.originals if self.values is None else effective_entries(self.originals, self.values)
        write_entries_(self.weight, self.indices, entries)

    def addresses(self) -> tuple[int, int, int, int, int]:
        """The column of a kernel's table: four addresses and the number of entries."""
        values = self.originals if self.values is None else self.values
        tensors = (self.weight, self.indices, self.originals, values)
        weight, indices, originals, value = (tensor.data_ptr() for tensor in tensors)
        return weight, indices, originals, value, self.indices.numel()


# Tables of addresses on the device, by their content: they rarely change between steps.
_tables: dict[tuple[Any, ...], Tensor] = {}
MAX_TABLES = 64


def _table(columns: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """``(5, tensors)`` int64 addresses and sizes on the device."""
    key = (device, columns)
    if key not in _tables:
        if len(_tables) >= MAX_TABLES:
            _tables.pop(next(iter(_tables)))
        table = torch.tensor(columns, dtype=torch.int64).t().contiguous()
        # pinned: the copy is ordered on the stream, and the host does not wait
        _tables[key] = table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table
    return _tables[key]


def _launch(kernel: str, writes: Sequence[_Write]) -> None:
    """All of one mode and one kind of weight and position in one launch."""
    first, largest = writes[0], max(write.indices.numel() for write in writes)
    table = _table(tuple(write.addresses() for write in writes), first.weight.device)
    if kernel == "cuda":
        cuda_kernels.write_many_(table, largest, first.weight.dtype, first.indices.dtype, first.mode)
    else:
        triton_kernels.kernels("entries").write_many_(
            table, largest, first.weight, first.indices, first.values, first.mode
        )
    if first.mode != "take":
        increment_version([write.weight for write in writes])


def _write_many(writes: Sequence[_Write]) -> None:
    """One launch for each kernel and combination of dtypes; PyTorch's operations for the other weights."""
    launches: dict[tuple[Any, ...], list[_Write]] = {}
    forced = forced_backend() is not None
    for write in writes:
        kernel = write.kernel() if forced or not write.weight.is_cpu else None
        if kernel is None:
            write.run()
        else:
            kind = (kernel, write.mode, write.weight.dtype, write.indices.dtype, write.weight.device)
            launches.setdefault(kind, []).append(write)
    for (kernel, *_), members in launches.items():
        for start in range(0, len(members), cuda_kernels.GRID_LIMIT):
            _launch(kernel, members[start : start + cuda_kernels.GRID_LIMIT])


def take_(weights: Sequence[Tensor], indices: Sequence[Tensor], originals: Sequence[Tensor]) -> None:
    """``original = weight.flat[index]`` for many weights, in one launch where there is a kernel.

    Args:
        weights: ``(rows, cols)`` each.
        indices: ``(entries,)`` flat positions each, unique within a weight.
        originals: ``(entries,)`` each, in the weight's dtype, to be filled.
    """
    _write_many([_Write("take", *column) for column in zip(weights, indices, originals, strict=True)])


def resync_(
    weights: Sequence[Tensor], indices: Sequence[Tensor], originals: Sequence[Tensor], values: Sequence[Tensor]
) -> None:
    """``weight.flat[index] = round(original + value)`` for many weights, in one launch where there is a kernel.

    Args:
        weights: ``(rows, cols)`` each.
        indices: ``(entries,)`` flat positions each, unique within a weight.
        originals: ``(entries,)`` each, in the weight's dtype: the entries of the base model.
        values: ``(entries,)`` each: the deltas.
    """
    columns = zip(weights, indices, originals, values, strict=True)
    _write_many([_Write("resync", weight, index, own, value.detach()) for weight, index, own, value in columns])


def restore_(weights: Sequence[Tensor], indices: Sequence[Tensor], originals: Sequence[Tensor]) -> None:
    """``weight.flat[index] = original`` for many weights, in one launch where there is a kernel."""
    _write_many([_Write("restore", *column) for column in zip(weights, indices, originals, strict=True)])


# ------------------------------------------------------------------------------------------------------------ supports


def _channels_of(weight: Tensor, support: ChannelSupport) -> tuple[int, ...]:
    """The shape of the weight's trained channels."""
    shape = list(weight.shape)
    shape[support.dim] = support.count
    return tuple(shape)


def _is_sliced(weight: Tensor, support: ChannelSupport) -> bool:
    """Whether the channels are slices of the weight; false for a convolution's weight that is flattened."""
    return support.width == 1 or weight.ndim > 2


def _of_rows(weight: Tensor, support: ChannelSupport) -> Tensor:
    """The weight, with the rows of fused experts one above the other, also of a single one."""
    has_channels = support.dim == 0 or weight.shape[1] * support.width == support.shape[1]
    return weight if has_channels and weight.shape[0] == support.shape[0] else weight.view(support.shape)


def _read_channels(weight: Tensor, support: ChannelSupport) -> Tensor:
    weight = _of_rows(weight, support)
    if _is_sliced(weight, support):
        return weight.index_select(support.dim, support.channels).reshape(-1)
    return weight.index_select(1, support.lines).reshape(-1)


def _write_channels_(weight: Tensor, support: ChannelSupport, entries: Tensor) -> None:
    weight, entries = _of_rows(weight.detach(), support), entries.detach()
    if _is_sliced(weight, support):
        weight.index_copy_(support.dim, support.channels.long(), entries.view(_channels_of(weight, support)))
    else:
        weight.index_copy_(1, support.lines, entries.view(support.matrix_shape))


def read_support(weight: Tensor, support: Support) -> Tensor:
    """The weight's entries at the support, as a new tensor ``(entries,)`` of the weight's dtype."""
    if isinstance(support, ChannelSupport):
        return _read_channels(weight, support)
    return _read_entries_of(weight, support)


def _read_entries_of(weight: Tensor, support: Support) -> Tensor:
    return read_entries(weight, support.indices) if kernels_possible(weight.device) else _read_pieces(weight, support)


def _read_pieces(weight: Tensor, support: Support) -> Tensor:
    found: Tensor | None = None
    for first, last, piece in support.flat_pieces():
        if last - first == support.nnz:
            return read_entries(weight, piece)
        found = weight.new_empty(support.nnz) if found is None else found
        read_entries(weight, piece, out=found[first:last])
    return weight.new_empty(0) if found is None else found


def write_support_(weight: Tensor, support: Support, entries: Tensor) -> None:
    """Overwrite the weight's entries at the support, in place; all others keep their bits."""
    if isinstance(support, ChannelSupport):
        _write_channels_(weight, support, entries)
    else:
        _write_pieces_(weight, support.flat_pieces(), entries)


def add_to_support_(weight: Tensor, support: Support, values: Tensor) -> None:
    """``weight[support] = round(weight[support] + values)``, in place and rounded once."""
    if isinstance(support, ChannelSupport):
        _write_channels_(weight, support, effective_entries(_read_channels(weight.detach(), support), values.detach()))
    else:
        _scatter_add_to_(weight, support, values)


def _scatter_add_to_(weight: Tensor, support: Support, values: Tensor) -> None:
    if kernels_possible(weight.device):
        scatter_add_(weight, support.indices, values)
        return
    weight, values = weight.detach(), values.detach()
    for first, last, piece in support.flat_pieces():
        write_piece_(weight, piece, effective_entries(read_entries(weight, piece), values[first:last]))
