"""The gradient of all experts' weights at a support: one dot product over an expert's tokens for each entry."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import Variant

BLOCK_ENTRIES = 16
BLOCK_TOKENS = 64  # an expert has few of the tokens


@triton.jit
def expert_support_grad_kernel(
    left: tl.tensor,
    right: tl.tensor,
    ends: tl.tensor,
    indices: tl.tensor,
    out: tl.tensor,
    entries: tl.tensor,
    rows: tl.tensor,
    cols: tl.tensor,
    left_stride: tl.tensor,
    right_stride: tl.tensor,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
) -> None:
    # Entries are sorted by expert: nearly all programs have entries of one expert, and read its tokens. Those of
    # several read the tokens of all, each entry with a mask of its own.
    e = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = e < entries
    # entries after the last one repeat it, so that they widen no range of tokens
    index = tl.load(indices + tl.minimum(e, entries - 1)).to(tl.int64)
    row = index // cols
    col = index - row * cols
    expert = row // rows
    row = row - expert * rows
    first = tl.load(ends + expert - 1, expert > 0, 0).to(tl.int32)
    last = tl.load(ends + expert).to(tl.int32)
    total = tl.zeros((BLOCK_E,), dtype=tl.float32)
    for start in range(tl.min(first, axis=0), tl.max(last, axis=0), BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        mask = (t[None, :] >= first[:, None]) & (t[None, :] < last[:, None])
        a = tl.load(left + row[:, None] * left_stride + t[None, :], mask, 0.0).to(tl.float32)
        b = tl.load(right + col[:, None] * right_stride + t[None, :], mask, 0.0).to(tl.float32)
        total += tl.sum(a * b, axis=1)
    tl.store(out + e, total + tl.load(out + e, inside, 0.0), inside)


def expert_support_grad_(out: Tensor, left: Tensor, right: Tensor, ends: Tensor, indices: Tensor) -> None:
    """Add the gradient of all experts at the entries of a support.

    Args:
        out: ``(entries,)`` float32; added to.
        left: ``(rows, tokens)``, tokens contiguous and sorted by expert; ``rows`` of one expert.
        right: ``(cols, tokens)``, tokens contiguous and sorted by expert.
        ends: ``(experts,)`` the token after each expert's last, contiguous.
        indices: ``(entries,)`` flat positions in ``(experts * rows, cols)``, sorted.
    """
    entries = indices.numel()
    if entries == 0:
        return
    expert_support_grad_kernel[(triton.cdiv(entries, BLOCK_ENTRIES),)](
        left, right, ends, indices, out, entries, left.shape[0], right.shape[0], left.stride(0), right.stride(0),
        BLOCK_E=BLOCK_ENTRIES, BLOCK_T=BLOCK_TOKENS,
    )  # fmt: skip


def signatures(dtype: torch.dtype) -> list[Variant]:
    """The variants to compile ahead of time: ``(kernel, argument types, constants)``."""
    x = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}[dtype]
    types = {
        "left": x, "right": x, "ends": "*i32", "indices": "*i32", "out": "*fp32", "entries": "i32", "rows": "i32",
        "cols": "i32", "left_stride": "i32", "right_stride": "i32",
    }  # fmt: skip
    blocks = {"BLOCK_E": BLOCK_ENTRIES, "BLOCK_T": BLOCK_TOKENS}
    return [
        (expert_support_grad_kernel, {**types, "indices": index, "ends": ends}, blocks)
        for index, ends in (("*i32", "*i32"), ("*i64", "*i64"))
    ]
