"""The gradient at the entries of a support: one dot product over the tokens for each entry."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import Variant

BLOCK_ENTRIES = 16
BLOCK_TOKENS = 256


@triton.jit
def support_grad_kernel(
    left: tl.tensor,
    right: tl.tensor,
    indices: tl.tensor,
    out: tl.tensor,
    entries: tl.tensor,
    cols: tl.tensor,
    tokens: tl.tensor,
    left_stride: tl.tensor,
    right_stride: tl.tensor,
    ADD: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
) -> None:
    # A program sums its entries over all tokens: the order is fixed, and no addition is atomic. Entries are sorted by
    # row: neighbours read the same row of `left`, which stays in the cache.
    e = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = e < entries
    index = tl.load(indices + e, inside, 0).to(tl.int64)
    row = index // cols
    col = index - row * cols
    total = tl.zeros((BLOCK_E,), dtype=tl.float32)
    for start in range(0, tokens, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        mask = inside[:, None] & (t < tokens)[None, :]
        a = tl.load(left + row[:, None] * left_stride + t[None, :], mask, 0.0).to(tl.float32)
        b = tl.load(right + col[:, None] * right_stride + t[None, :], mask, 0.0).to(tl.float32)
        total += tl.sum(a * b, axis=1)
    if ADD:
        total += tl.load(out + e, inside, 0.0)
    tl.store(out + e, total, inside)


def support_grad_(out: Tensor, left: Tensor, right: Tensor, indices: Tensor, cols: int, add: bool) -> None:
    """The gradient at the entries of a support.

    Args:
        out: ``(entries,)`` float32; set or added to.
        left: ``(rows, tokens)``, tokens contiguous.
        right: ``(cols, tokens)``, tokens contiguous.
        indices: ``(entries,)`` flat positions, sorted.
        cols: columns of the weight.
        add: whether to add to ``out``.
    """
    entries = indices.numel()
    support_grad_kernel[(triton.cdiv(entries, BLOCK_ENTRIES),)](
        left, right, indices, out, entries, cols, left.shape[1], left.stride(0), right.stride(0),
        ADD=add, BLOCK_E=BLOCK_ENTRIES, BLOCK_T=BLOCK_TOKENS,
    )  # fmt: skip


def signatures(dtype: torch.dtype) -> list[Variant]:
    """The variants to compile ahead of time: ``(kernel, argument types, constants)``."""
    x = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}[dtype]
    types = {
        "left": x, "right": x, "indices": "*i32", "out": "*fp32", "entries": "i32", "cols": "i32", "tokens": "i32",
        "left_stride": "i32", "right_stride": "i32",
    }  # fmt: skip
    return [(support_grad_kernel, types, {"ADD": True, "BLOCK_E": BLOCK_ENTRIES, "BLOCK_T": BLOCK_TOKENS})]
