"""The gradient at row groups, as dense tiles: for supports of blocks, rows or columns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...support import RowGroup
from . import Variant
from .tile_product import tile_product

BLOCK_ROWS = 64
BLOCK_COLS = 64
BLOCK_TOKENS = 32


@triton.jit
def support_grad_tiles_kernel(
    left: tl.tensor,
    right: tl.tensor,
    cols: tl.tensor,
    work: tl.tensor,
    out: tl.tensor,
    tokens: tl.tensor,
    left_stride: tl.tensor,
    right_stride: tl.tensor,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
) -> None:
    # one program per piece of work: first row, number of rows, index of its first column in `cols`, number of columns,
    # first entry in `out`, entries per row
    item = work + tl.program_id(0) * 6
    first_row, rows = tl.load(item), tl.load(item + 1)
    first_col, width = tl.load(item + 2), tl.load(item + 3)
    first_entry, stride = tl.load(item + 4), tl.load(item + 5)
    r = tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_C)
    col = tl.load(cols + first_col + c, c < width, 0)
    total = tile_product(
        left, right, first_row + r, col, r < rows, c < width, tokens, left_stride, right_stride,
        PRECISION, BLOCK_R, BLOCK_C, BLOCK_T,
    )  # fmt: skip
    at = out + first_entry + r[:, None] * stride + c[None, :]
    tl.store(at, total, (r < rows)[:, None] & (c < width)[None, :])


def work_list(groups: Sequence[RowGroup], device: torch.device) -> tuple[Tensor, Tensor]:
    """The groups' concatenated columns ``(columns,)``, and the pieces of work ``(pieces, 6)``, both int64."""
    cols, pieces, offset = [], [], 0
    for group in groups:
        width = (group.last - group.first) // (group.stop - group.start)
        cols.append(torch.arange(width, device=device) if group.cols is None else group.cols)
        for row in range(group.start, group.stop, BLOCK_ROWS):
            for col in range(0, width, BLOCK_COLS):
                pieces.append(
                    (
                        row, min(BLOCK_ROWS, group.stop - row), offset + col, min(BLOCK_COLS, width - col),
                        group.first + (row - group.start) * width + col, width,
                    )
                )  # fmt: skip
        offset += width
    return torch.cat(cols), torch.tensor(pieces, dtype=torch.int64, device=device)


def support_grad_tiles_(out: Tensor, left: Tensor, right: Tensor, cols: Tensor, work: Tensor) -> None:
    """Set ``out`` ``(entries,)`` float32 from ``left`` ``(tokens, rows)`` and ``right`` ``(tokens, cols)``."""
    support_grad_tiles_kernel[(work.shape[0],)](
        left, right, cols, work, out, left.shape[0], left.stride(0), right.stride(0),
        PRECISION="ieee", BLOCK_R=BLOCK_ROWS, BLOCK_C=BLOCK_COLS, BLOCK_T=BLOCK_TOKENS,
    )  # fmt: skip


def signatures(dtype: torch.dtype) -> list[Variant]:
    """The variants to compile ahead of time: ``(kernel, argument types, constants)``."""
    x = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}[dtype]
    types = {
        "left": x, "right": x, "cols": "*i64", "work": "*i64", "out": "*fp32", "tokens": "i32",
        "left_stride": "i32", "right_stride": "i32",
    }  # fmt: skip
    blocks = {"PRECISION": "ieee", "BLOCK_R": BLOCK_ROWS, "BLOCK_C": BLOCK_COLS, "BLOCK_T": BLOCK_TOKENS}
    return [(support_grad_tiles_kernel, types, blocks)]
