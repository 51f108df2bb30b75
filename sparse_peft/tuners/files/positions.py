"""How positions lie in an adapter's file and in memory: two bytes each where they can.

For each layer a file has the entries' columns, ``cols`` ``(entries,)`` uint16, and the number of entries in each row,
``row_counts`` ``(rows,)`` uint16. This is the compressed sparse row format with counts, half as long as pointers. A
layer of more than 65,535 columns, or with fewer entries than rows, has ``indices`` instead, flat row-major positions.

In memory a layer has one buffer that no other tensor repeats. It is ``packed`` uint8, the bytes of row pointers and of
columns, or flat ``indices`` where these are smaller. Bytes, because processes exchange buffers at the start of
distributed training, and have no operations on uint16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...support import Support, check_stored, compact_layout, index_dtype, layout_bytes
from ..base_state import UNSET

FLAT, PACKED = "indices", "packed"
NAMES = (FLAT, "cols", "row_counts", PACKED)
UINT16_MAX = 2**16 - 1


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
    if "cols" in names:
        sizes = {"cols": entries, "row_counts": shape[0]}
        return {name: torch.zeros(size, dtype=torch.uint16) for name, size in sizes.items()}
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


def file_layout(shape: tuple[int, int], entries: int) -> dict[str, tuple[int, torch.dtype]]:
    """``{tensor name: (length, dtype)}`` of the positions of a layer in a file."""
    rows, cols = shape
    if cols > UINT16_MAX or entries < rows:
        return {FLAT: (entries, index_dtype(shape))}
    return {"cols": (entries, torch.uint16), "row_counts": (rows, torch.uint16)}


def pack(support: Support) -> dict[str, Tensor]:
    """The positions as they lie in a file."""
    layout = file_layout(support.shape, support.nnz)
    if FLAT in layout:
        return {FLAT: support.indices}
    return {"cols": support.cols.to(torch.uint16), "row_counts": support.row_ptr.diff().to(torch.uint16)}


def unpack(tensors: dict[str, Tensor], shape: tuple[int, int], layer: str) -> Tensor | None:
    """Flat positions ``(entries,)`` from those of a file's tensors that it has; None if it has none.

    Raises:
        ValueError: the tensors contradict each other or the weight's shape.
    """
    if FLAT in tensors:
        return tensors[FLAT]
    if not {"cols", "row_counts"} <= set(tensors):
        return None
    rows, cols = shape
    for name in ("cols", "row_counts"):
        _check_unsigned(tensors[name], name, cols, layer)
    counts, columns = tensors["row_counts"].long(), tensors["cols"].long()
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
