"""Codebooks: weights from packed codes, and the codebook's gradient from the weight's."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import Variant

BLOCK_COLS = 256


@triton.jit
def _code(codes: tl.tensor, row_bytes: tl.tensor, j: tl.tensor, inside: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    # a row is one stream of bits, highest bit first; a code lies in one byte or in two neighbours
    bit = j * BITS
    byte = bit // 8
    high = tl.load(codes + byte, inside, 0).to(tl.int32)
    low = tl.load(codes + byte + 1, inside & (byte + 1 < row_bytes), 0).to(tl.int32)
    return ((high * 256 + low) >> (16 - BITS - bit % 8)) & ((1 << BITS) - 1)


@triton.jit
def code_gather_kernel(
    codebook: tl.tensor,
    codes: tl.tensor,
    out: tl.tensor,
    cols: tl.tensor,
    groups: tl.tensor,
    row_bytes: tl.tensor,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = j < cols
    code = _code(codes + row * row_bytes, row_bytes, j, inside, BITS)
    group = (j.to(tl.int64) * groups) // cols
    value = tl.load(codebook + (row * groups + group) * (1 << BITS) + code, inside, 0.0)
    tl.store(out + row * cols + j, value.to(out.dtype.element_ty), inside)


@triton.jit
def code_scatter_add_kernel(
    grad: tl.tensor,
    codes: tl.tensor,
    out: tl.tensor,
    cols: tl.tensor,
    groups: tl.tensor,
    row_bytes: tl.tensor,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    # one program per table: its sums stay in registers, in a fixed order
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1).to(tl.int64)
    first = (group * cols + groups - 1) // groups
    last = ((group + 1) * cols + groups - 1) // groups
    k = tl.arange(0, 1 << BITS)
    total = tl.zeros((1 << BITS,), dtype=tl.float32)
    for start in range(first, last, BLOCK):
        j = start + tl.arange(0, BLOCK)
        inside = j < last
        code = _code(codes + row * row_bytes, row_bytes, j, inside, BITS)
        value = tl.load(grad + row * cols + j, inside, 0.0).to(tl.float32)
        total += tl.sum(tl.where(code[:, None] == k[None, :], value[:, None], 0.0), axis=0)
    tl.store(out + (row * groups + group) * (1 << BITS) + k, total)


def code_gather_(out: Tensor, codebook: Tensor, codes: Tensor, bits: int) -> None:
    """``out`` ``(rows, cols)`` from ``codebook`` ``(rows, groups, 2**bits)`` and packed ``codes``, all contiguous."""
    rows, cols = out.shape
    code_gather_kernel[(rows, triton.cdiv(cols, BLOCK_COLS))](
        codebook, codes, out, cols, codebook.shape[1], codes.shape[1], BITS=bits, BLOCK=BLOCK_COLS
    )


def code_scatter_add_(out: Tensor, grad: Tensor, codes: Tensor, bits: int) -> None:
    """``out`` ``(rows, groups, 2**bits)`` float32 from ``grad`` ``(rows, cols)`` and packed ``codes``."""
    rows, cols = grad.shape
    code_scatter_add_kernel[(rows, out.shape[1])](
        grad, codes, out, cols, out.shape[1], codes.shape[1], BITS=bits, BLOCK=BLOCK_COLS if bits < 8 else 32
    )


def signatures(dtype: torch.dtype) -> list[Variant]:
    """The variants to compile ahead of time: ``(kernel, argument types, constants)``."""
    x = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}[dtype]
    sizes = {"cols": "i32", "groups": "i32", "row_bytes": "i32"}
    found = []
    for bits in (2, 3, 4, 8):
        gather = {"codebook": "*fp32", "codes": "*u8", "out": x, **sizes}
        found.append((code_gather_kernel, gather, {"BITS": bits, "BLOCK": BLOCK_COLS}))
        scatter = {"grad": x, "codes": "*u8", "out": "*fp32", **sizes}
        found.append((code_scatter_add_kernel, scatter, {"BITS": bits, "BLOCK": BLOCK_COLS if bits < 8 else 32}))
    return found
