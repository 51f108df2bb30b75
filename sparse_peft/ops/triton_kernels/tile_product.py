"""The product that kernels form in registers: a tile of a dense weight gradient."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_product(
    left: tl.tensor,
    right: tl.tensor,
    row: tl.tensor,
    col: tl.tensor,
    has_row: tl.tensor,
    has_col: tl.tensor,
    tokens: tl.tensor,
    left_stride: tl.tensor,
    right_stride: tl.tensor,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
) -> tl.tensor:
    """``(left.T @ right)[row, col]`` in float32, zero where a row or column is masked out.

    ``left`` is ``(tokens, rows)`` and ``right`` ``(tokens, cols)``, their last dimensions contiguous.
    """
    total = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    for start in range(0, tokens, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T).to(tl.int64)
        here = t < tokens
        a = tl.load(left + t[None, :] * left_stride + row[:, None], here[None, :] & has_row[:, None], 0.0)
        b = tl.load(right + t[:, None] * right_stride + col[None, :], here[:, None] & has_col[None, :], 0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    return total
