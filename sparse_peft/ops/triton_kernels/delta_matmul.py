"""Product of activations with a sparse matrix, added to the output."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import Variant

BLOCK_TOKENS = 16
BLOCK_ENTRIES = 64


@triton.jit
def delta_matmul_kernel(
    x: tl.tensor,
    values: tl.tensor,
    row_ptr: tl.tensor,
    cols: tl.tensor,
    out: tl.tensor,
    tokens: tl.tensor,
    x_stride: tl.tensor,
    out_stride: tl.tensor,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    first, last = tl.load(row_ptr + row), tl.load(row_ptr + row + 1)
    if first < last:
        t = (tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
        total = tl.zeros((BLOCK_T,), dtype=tl.float32)
        for start in range(first, last, BLOCK_E):
            e = start + tl.arange(0, BLOCK_E)
            inside = e < last
            col = tl.load(cols + e, inside, 0).to(tl.int64)
            value = tl.load(values + e, inside, 0.0).to(tl.float32)
            a = tl.load(x + t[:, None] * x_stride + col[None, :], (t < tokens)[:, None] & inside[None, :], 0.0)
            total += tl.sum(a.to(tl.float32) * value[None, :], axis=1)
        at = out + t * out_stride + row
        old = tl.load(at, t < tokens, 0.0)
        tl.store(at, (old.to(tl.float32) + total).to(old.dtype), t < tokens)


def delta_matmul_add_(out: Tensor, x: Tensor, values: Tensor, row_ptr: Tensor, cols: Tensor) -> None:
    """``out += x @ S.T``, ``(tokens, rows)`` and ``(tokens, cols)``, last dimensions contiguous; float32 sums."""
    delta_matmul_kernel[(row_ptr.numel() - 1, triton.cdiv(x.shape[0], BLOCK_TOKENS))](
        x, values, row_ptr, cols, out, x.shape[0], x.stride(0), out.stride(0),
        BLOCK_T=BLOCK_TOKENS, BLOCK_E=BLOCK_ENTRIES,
    )  # fmt: skip


def signatures(dtype: torch.dtype) -> list[Variant]:
    """The variants to compile ahead of time: ``(kernel, argument types, constants)``."""
    x = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}[dtype]
    types = {
        "x": x, "values": "*fp32", "row_ptr": "*i32", "cols": "*i32", "out": x, "tokens": "i32", "x_stride": "i32",
        "out_stride": "i32",
    }  # fmt: skip
    return [(delta_matmul_kernel, types, {"BLOCK_T": BLOCK_TOKENS, "BLOCK_E": BLOCK_ENTRIES})]
