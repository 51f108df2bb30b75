"""The dense weight gradient in tiles that never reach memory: its entries at a support, and its largest others."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import Variant
from .tile_product import tile_product

BLOCK_ROWS = 64
BLOCK_COLS = 64
BLOCK_TOKENS = 32


@triton.jit
def _set_bits(word: tl.tensor) -> tl.tensor:
    # population count of a 32-bit word, without an instruction that the interpreter does not have
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24) & 0xFF


@triton.jit
def masked_dw_kernel(
    left: tl.tensor,
    right: tl.tensor,
    words: tl.tensor,
    before: tl.tensor,
    values: tl.tensor,
    threshold: tl.tensor,
    counter: tl.tensor,
    positions: tl.tensor,
    found: tl.tensor,
    capacity: tl.tensor,
    rows: tl.tensor,
    cols: tl.tensor,
    tokens: tl.tensor,
    words_a_row: tl.tensor,
    left_stride: tl.tensor,
    right_stride: tl.tensor,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
) -> None:
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tile_product(
        left, right, r, c, r < rows, c < cols, tokens, left_stride, right_stride,
        PRECISION, BLOCK_R, BLOCK_C, BLOCK_T,
    )  # fmt: skip
    inside = (r < rows)[:, None] & (c < cols)[None, :]
    # `words` has one bit per weight, and `before` the number of entries before each word: together they give each
    # entry's slot in the support
    at = r[:, None].to(tl.int64) * words_a_row + (c // 32)[None, :]
    word = tl.load(words + at, inside, 0)
    bit = (c % 32)[None, :]
    trained = ((word >> bit) & 1) == 1
    slot = tl.load(before + at, inside, 0) + _set_bits(word & ((1 << bit) - 1))
    tl.store(values + slot, total, inside & trained)
    # NaN is not below the threshold: it is appended, so that the caller sees it
    grows = inside & (trained == 0) & ((tl.abs(total) < tl.load(threshold)) == 0)
    flat = tl.reshape(grows.to(tl.int32), (BLOCK_R * BLOCK_C,))
    count = tl.sum(flat, axis=0)
    if count > 0:
        first = tl.atomic_add(counter, count)
        place = first + tl.cumsum(flat, axis=0) - flat
        position = tl.reshape(r[:, None].to(tl.int64) * cols + c[None, :], (BLOCK_R * BLOCK_C,))
        keep = (flat == 1) & (place < capacity)
        tl.store(positions + place, position, keep)
        tl.store(found + place, tl.reshape(total, (BLOCK_R * BLOCK_C,)), keep)


def masked_dw(
    left: Tensor,
    right: Tensor,
    words: Tensor,
    before: Tensor,
    values: Tensor,
    threshold: Tensor,
    capacity: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fill ``values`` at the support, and find the other gradients that are not below a threshold.

    Args:
        left: ``(tokens, rows)``, the last dimension contiguous.
        right: ``(tokens, cols)``, the last dimension contiguous.
        words: from ``sparse_peft.ops.masked_dw.bitmap``.
        before: from ``sparse_peft.ops.masked_dw.bitmap``.
        values: ``(entries,)`` float32, written.
        threshold: ``(1,)`` float32.
        capacity: maximum number of other gradients to return.

    Returns:
        ``(1,)`` number of other gradients found, which may exceed ``capacity``; ``(capacity,)`` positions and
        gradients, in no order.
    """
    (tokens, rows), cols = left.shape, right.shape[1]
    counter = torch.zeros(1, dtype=torch.int32, device=left.device)
    positions = torch.empty(capacity, dtype=torch.int64, device=left.device)
    found = torch.empty(capacity, dtype=torch.float32, device=left.device)
    masked_dw_kernel[(triton.cdiv(rows, BLOCK_ROWS), triton.cdiv(cols, BLOCK_COLS))](
        left, right, words, before, values, threshold, counter, positions, found, capacity,
        rows, cols, tokens, words.shape[1], left.stride(0), right.stride(0),
        PRECISION="ieee", BLOCK_R=BLOCK_ROWS, BLOCK_C=BLOCK_COLS, BLOCK_T=BLOCK_TOKENS,
    )  # fmt: skip
    return counter, positions, found


def signatures(dtype: torch.dtype) -> list[Variant]:
    """The variants to compile ahead of time: ``(kernel, argument types, constants)``."""
    x = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}[dtype]
    types = {
        "left": x, "right": x, "words": "*i32", "before": "*i32", "values": "*fp32", "threshold": "*fp32",
        "counter": "*i32", "positions": "*i64", "found": "*fp32", "capacity": "i32", "rows": "i32", "cols": "i32",
        "tokens": "i32", "words_a_row": "i32", "left_stride": "i32", "right_stride": "i32",
    }  # fmt: skip
    blocks = {"PRECISION": "ieee", "BLOCK_R": BLOCK_ROWS, "BLOCK_C": BLOCK_COLS, "BLOCK_T": BLOCK_TOKENS}
    return [(masked_dw_kernel, types, blocks)]
