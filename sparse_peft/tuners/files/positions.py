"""How positions lie in an adapter's file and in memory: two bytes each where they can.

For each layer a file has the entries' columns, ``cols`` ``(entries,)`` uint16, and the number of entries in each row,
``row_counts`` ``(rows,)`` uint16. This is the compressed sparse row format with counts, half as long as pointers.

A weight of more than 65,536 numbers, with fewer than four entries a row or more than 65,535 columns, has flat
row-major positions in two parts (the code of Elias and Fano). ``low`` ``(entries,)`` uint16 are their last 16 bits.
``high`` uint8 are bits, the lowest of a byte first: bit ``number of the entry + its position // 65536`` is set for
each entry. Weights with so few entries that this takes more have whole positions, ``indices``. So have smaller weights
with fewer entries than rows, whose files are as those of version 0.1.0.

In memory a layer has one buffer that no other tensor repeats. It is ``packed`` uint8, the bytes of row pointers and of
columns, or flat ``indices`` where these are smaller. Bytes, because processes exchange buffers at the start of
distributed training, and have no operations on uint16.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...support import Support, check_stored, compact_layout, index_dtype, layout_bytes
from ..base_state import UNSET

FLAT, PACKED = "indices", "packed"
NAMES = (FLAT, "cols", "row_counts", "low", "high", PACKED)
UINT16_MAX = 2**16 - 1
FEWEST_IN_A_ROW = 4  # with which row counts take half a byte an entry
SMALL = 2**16  # numbers of a weight, below which headers take more than is to be gained


def memory_bytes(shape: tuple[int, int], entries: int) -> int:
    """Bytes of a layer's positions in memory."""
    return layout_bytes(compact_layout(shape, entries))


def memory_form(support: Support) -> dict[str, Tensor]:
    """``{buffer name: tensor}`` of the positions in memory; always new memory."""
    support = support.compact()
    if len(support.stored) == 1:
        return {FLAT: support.indices.clone()}
    return {PACKED: torch.cat([tensor.contiguous().view(torch.uint8) for tensor in support.stored])}


def unset_form(names: set[str], shape: tuple[int, int], entries: int) -> dict[str, Tensor]:
    """Buffers of positions that are to be filled.

    Args:
        names: of the tensors that will fill them; ``{PACKED}`` for positions as in memory.
        shape: ``(rows, cols)`` of the weight.
        entries: number of positions.
    """
    layout = compact_layout(shape, entries)
    for form in _ROWS, _PARTS:
        if names & form.keys():
            return {name: torch.zeros(n, dtype=kind) for name, (n, kind) in _layout(form, shape, entries).items()}
    if PACKED in names and len(layout) > 1:
        return {PACKED: torch.full((layout_bytes(layout),), 255, dtype=torch.uint8)}
    return {FLAT: torch.full((entries,), UNSET, dtype=index_dtype(shape))}


def is_unset(buffer: Tensor) -> bool:
    """Whether a buffer of positions in memory is to be filled; its first row pointer is 0 otherwise."""
    return buffer.numel() > 0 and int(buffer[0]) == (255 if buffer.dtype == torch.uint8 else UNSET)


def support_of(buffer: Tensor, shape: tuple[int, int], entries: int, name: str) -> Support:
    """The positions in memory as a support, which reads the buffer itself.

    Args:
        buffer: one that ``memory_form`` returned, or flat positions, which are checked.
        shape: ``(rows, cols)`` of the weight.
        entries: number of positions.
        name: the layer's name.

    Raises:
        TypeError, ValueError: positions that do not fit the weight.
    """
    if buffer.dtype != torch.uint8:
        return Support(shape, buffer, name=name)
    layout = compact_layout(shape, entries)
    if len(layout) == 1 or buffer.numel() != layout_bytes(layout):
        raise ValueError(
            f"layer {name}: {buffer.numel()} bytes of packed positions, where {entries} of a weight of {shape[0]} x "
            f"{shape[1]} have {layout_bytes(layout)}; they were made for another weight"
        )
    size = layout_bytes(layout[:1])
    parts = buffer[:size].view(layout[0][1]), buffer[size:].view(layout[1][1])
    check_stored(shape, parts, name)
    return Support.of_stored(shape, parts, name)


# {tensor name: (its length, given the weight's shape and the number of entries; its dtype)}
_Form = dict[str, tuple[Callable[[tuple[int, int], int], int], torch.dtype]]
_ROWS: _Form = {
    "cols": (lambda shape, entries: entries, torch.uint16),
    "row_counts": (lambda shape, entries: shape[0], torch.uint16),
}
_PARTS: _Form = {
    "low": (lambda shape, entries: entries, torch.uint16),
    "high": (lambda shape, entries: -(-(entries + (shape[0] * shape[1] - 1 >> 16)) // 8), torch.uint8),
}


def file_layout(shape: tuple[int, int], entries: int) -> dict[str, tuple[int, torch.dtype]]:
    """``{tensor name: (length, dtype)}`` of the positions of a layer in a file."""
    rows, cols = shape
    fewest = FEWEST_IN_A_ROW if rows * cols > SMALL else 1
    if cols <= UINT16_MAX and entries >= fewest * rows:
        return _layout(_ROWS, shape, entries)
    flat, parts = {FLAT: (entries, index_dtype(shape))}, _layout(_PARTS, shape, entries)
    if rows * cols <= SMALL or layout_bytes(list(flat.values())) <= layout_bytes(list(parts.values())):
        return flat
    return parts


def _layout(form: _Form, shape: tuple[int, int], entries: int) -> dict[str, tuple[int, torch.dtype]]:
    return {name: (size(shape, entries), kind) for name, (size, kind) in form.items()}


def pack(support: Support) -> dict[str, Tensor]:
    """The positions as they lie in a file."""
    layout = file_layout(support.shape, support.nnz)
    if FLAT in layout:
        return {FLAT: support.indices}
    if "cols" in layout:
        return {"cols": support.cols.to(torch.uint16), "row_counts": support.row_ptr.diff().to(torch.uint16)}
    flat = support.indices.long()
    bits = torch.zeros(layout["high"][0], 8, dtype=torch.uint8, device=flat.device)
    bits.view(-1)[(flat >> 16) + torch.arange(len(flat), device=flat.device)] = 1
    high = (bits << torch.arange(8, dtype=torch.uint8, device=flat.device)).sum(1, dtype=torch.uint8)
    return {"low": (flat & UINT16_MAX).to(torch.uint16), "high": high}


def is_read(tensors: dict[str, Tensor]) -> bool:
    """Whether buffers as in a file were filled: those that wait for it are zeros."""
    return any(bool((tensors[name] != 0).any()) for name in ("row_counts", "high") if name in tensors)


def unpack(tensors: dict[str, Tensor], shape: tuple[int, int], layer: str) -> Tensor | None:
    """Flat positions ``(entries,)`` from those of a file's tensors that it has; None if it has none.

    Raises:
        ValueError: the tensors contradict each other or the weight's shape.
    """
    if FLAT in tensors:
        return tensors[FLAT]
    if _ROWS.keys() <= tensors.keys():
        return _of_rows(tensors["cols"], tensors["row_counts"], shape, layer)
    if _PARTS.keys() <= tensors.keys():
        return _of_parts(tensors["low"], tensors["high"], shape, layer)
    return None


def _of_rows(columns: Tensor, counts: Tensor, shape: tuple[int, int], layer: str) -> Tensor:
    rows, cols = shape
    _check_unsigned(columns, "cols", cols, layer)
    _check_unsigned(counts, "row_counts", cols, layer)
    counts, columns = counts.long(), columns.long()
    if counts.shape != (rows,) or columns.ndim != 1 or int(counts.sum()) != columns.numel():
        raise ValueError(
            f"layer {layer}: {tuple(columns.shape)} cols and {tuple(counts.shape)} row_counts, which add up to "
            f"{int(counts.sum())}, for a weight of {rows} x {cols}; the adapter was made for a weight of another "
            "shape, or its file is damaged: save or download it again"
        )
    if columns.numel() and int(columns.amax()) >= cols:
        raise ValueError(
            f"layer {layer}: cols contain {int(columns.amax())}, but a {rows} x {cols} weight has columns 0 to "
            f"{cols - 1}; the adapter was made for a weight of another shape, or its file is damaged"
        )
    row = torch.arange(rows, device=counts.device).repeat_interleave(counts)
    return (row * cols + columns).to(index_dtype(shape))


def _of_parts(low: Tensor, high: Tensor, shape: tuple[int, int], layer: str) -> Tensor:
    for name, tensor in (("low", low), ("high", high)):
        if tensor.dtype != _PARTS[name][1] or tensor.ndim != 1:
            raise ValueError(
                f"layer {layer}: {name} of dtype {tensor.dtype} and shape {tuple(tensor.shape)} in the adapter file; "
                f"{_PARTS[name][1]} in one dimension is expected: its file is damaged, save or download it again"
            )
    bits = (high[:, None] >> torch.arange(8, dtype=torch.uint8, device=high.device)) & 1
    found = bits.view(-1).nonzero().squeeze(1)
    if found.shape != low.shape:
        raise ValueError(
            f"layer {layer}: {low.numel()} positions in low, and {found.numel()} in high; the adapter was made for a "
            "weight of another shape, or its file is damaged: save or download it again"
        )
    number = torch.arange(len(found), device=found.device)
    flat = ((found - number) << 16) | low.long()
    if flat.numel() and int(flat[-1]) >= shape[0] * shape[1]:
        raise ValueError(
            f"layer {layer}: low and high contain {int(flat[-1])}, but a {shape[0]} x {shape[1]} weight has positions "
            f"0 to {shape[0] * shape[1] - 1}; the adapter was made for a weight of another shape, or its file is "
            "damaged: save or download it again"
        )
    return flat.to(index_dtype(shape))


def _check_unsigned(tensor: Tensor, name: str, cols: int, layer: str) -> None:
    """Refuse numbers that repeating rows by them would not survive; sums of large ones wrap around."""
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"layer {layer}: {name} of dtype {tensor.dtype} in the adapter file; integers are expected")
    if tensor.numel() == 0:
        return
    low, high = (int(bound) for bound in tensor.long().aminmax())
    if low < 0 or (name == "row_counts" and high > cols):
        raise ValueError(
            f"layer {layer}: {name} contain {low if low < 0 else high}, but a row of the weight has {cols} columns; "
            "the adapter was made for a weight of another shape, or its file is damaged"
        )
