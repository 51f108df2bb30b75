"""Reading and writing the entries of a weight at a support.

The effective entry is ``round(original + value)``: the sum is formed in the wider of the two dtypes and rounded once
to the weight's, so that training, merging and a reloaded adapter give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..numerics.panels import panels
from . import cuda_kernels, triton_kernels
from .plans import forced_backend, kernel_backend


def read_entries(weight: Tensor, indices: Tensor, out: Tensor | None = None) -> Tensor:
    """The weight's entries at flat row-major ``indices``: ``(entries,)`` of its dtype, new or written to ``out``."""
    if weight.is_contiguous():
        return torch.index_select(weight.view(-1), 0, indices, out=out)
    entries = weight[torch.unravel_index(indices.long(), weight.shape)]
    return entries if out is None else out.copy_(entries)


def write_entries_(weight: Tensor, indices: Tensor, entries: Tensor) -> None:
    """Overwrite the weight's entries at flat row-major ``indices``, in place; every other bit stays as it is."""
    weight, entries = weight.detach(), entries.detach()
    # scatter_ wants int64 positions; in pieces, so that they are never larger than a panel
    for start, stop in panels(indices.numel(), torch.int64.itemsize):
        piece = indices[start:stop].long()
        if weight.is_contiguous():
            weight.view(-1).scatter_(0, piece, entries[start:stop])
        else:
            weight[torch.unravel_index(piece, weight.shape)] = entries[start:stop]


def effective_entries(originals: Tensor, values: Tensor) -> Tensor:
    """``round(original + value)`` in the originals' dtype, ``(entries,)``."""
    wide = torch.promote_types(originals.dtype, values.dtype)
    return (originals.to(wide) + values.to(wide)).to(originals.dtype)


def _kernel_for(op: str, weight: Tensor, indices: Tensor, values: Tensor | None) -> str | None:
    """The kernel backend for these tensors; None for PyTorch's operations, which take whatever there is."""
    if not weight.is_contiguous() or not indices.is_contiguous() or indices.numel() == 0:
        return None
    if values is not None and not (values.dtype == torch.float32 and values.is_contiguous()):
        return None
    return kernel_backend(op, weight.dtype, weight.device, indices.dtype)


def scatter_add_(weight: Tensor, indices: Tensor, values: Tensor) -> None:
    """``weight.flat[indices] = round(weight.flat[indices] + values)``, in place and rounded once.

    Args:
        weight: ``(rows, cols)`` floats.
        indices: ``(entries,)`` flat row-major positions, each at most once: the result does not depend on any order.
        values: ``(entries,)`` floats.
    """
    kernel = _kernel_for("scatter_add", weight, indices, values)
    if kernel is None:
        write_entries_(weight, indices, effective_entries(read_entries(weight.detach(), indices), values.detach()))
        return
    if kernel == "cuda":
        cuda_kernels.scatter_add_(weight, indices, values)
    else:
        triton_kernels.kernels("entries").add_entries_(weight, indices, values)
    increment_version(weight)


# Tables of addresses on the device, by the addresses: from one step to the next they hardly ever change.
_tables: dict[tuple, Tensor] = {}
MAX_TABLES = 64


def _table(columns: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    key = (device, *columns)
    if key not in _tables:
        if len(_tables) >= MAX_TABLES:
            _tables.pop(next(iter(_tables)))
        table = torch.tensor(columns, dtype=torch.int64)
        # pinned: the copy is ordered on the stream, and the host goes on
        _tables[key] = table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table
    return _tables[key]


def _write_many(
    weights: Sequence[Tensor],
    indices: Sequence[Tensor],
    originals: Sequence[Tensor],
    values: Sequence[Tensor] | None,
    take: bool,
) -> None:
    """All tensors that a kernel takes in one launch for each combination of types, the others one by one."""
    together: dict[tuple, list[int]] = {}
    forced = forced_backend() is not None
    for n, (weight, index) in enumerate(zip(weights, indices, strict=True)):
        value = None if values is None else values[n].detach()
        kernel = None
        if (forced or not weight.is_cpu) and originals[n].is_contiguous():
            kernel = _kernel_for("write_entries", weight, index, value)
        if kernel is not None:
            together.setdefault((kernel, weight.dtype, index.dtype, weight.device), []).append(n)
        elif index.numel():
            if take:
                read_entries(weight.detach(), index, out=originals[n])
            entries = originals[n] if value is None else effective_entries(originals[n], value)
            write_entries_(weight, index, entries)
    for (kernel, dtype, index_dtype, device), members in together.items():
        for start in range(0, len(members), cuda_kernels.GRID_LIMIT):
            part = members[start : start + cuda_kernels.GRID_LIMIT]
            columns = tuple(
                tuple(tensors[n].data_ptr() for n in part)
                for tensors in (weights, indices, originals, originals if values is None else values)
            )
            sizes = tuple(indices[n].numel() for n in part)
            table = _table((*columns, sizes), device)
            if kernel == "cuda":
                mode = "restore" if values is None else "take" if take else "resync"
                cuda_kernels.write_many_(table, max(sizes), dtype, index_dtype, mode)
            else:
                first = part[0]
                value = None if values is None else values[first]
                triton_kernels.kernels("entries").write_many_(
                    table, max(sizes), weights[first], indices[first], value, take
                )
            increment_version([weights[n] for n in part])


def resync_(
    weights: Sequence[Tensor],
    indices: Sequence[Tensor],
    originals: Sequence[Tensor],
    values: Sequence[Tensor],
    take: bool,
) -> None:
    """``weight.flat[index] = round(original + value)`` for many weights, in one launch where there is a kernel.

    Args:
        weights: ``(rows, cols)`` each.
        indices: ``(entries,)`` flat positions each, in no weight one twice.
        originals: ``(entries,)`` each, in the weight's dtype: the base's own entries.
        values: ``(entries,)`` each: the deltas.
        take: fill ``originals`` from the weights first.
    """
    _write_many(weights, indices, originals, values, take)


def restore_(weights: Sequence[Tensor], indices: Sequence[Tensor], originals: Sequence[Tensor]) -> None:
    """``weight.flat[index] = original`` for many weights, in one launch where there is a kernel."""
    _write_many(weights, indices, originals, None, False)
