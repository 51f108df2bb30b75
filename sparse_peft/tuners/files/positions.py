"""How positions lie in an adapter's file: two bytes each where they can.

For each layer a file has the entries' columns, ``cols`` ``(entries,)`` uint16, and the number of entries in each row,
``row_counts`` ``(rows,)`` uint16. This is the compressed sparse row format with counts, half as long as pointers. A
layer of more than 65,535 columns, or with fewer entries than rows, has ``indices`` instead, flat row-major positions.
In memory positions are always flat.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...support import Support, index_dtype

FLAT = "indices"
NAMES = (FLAT, "cols", "row_counts")
UINT16_MAX = 2**16 - 1


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
