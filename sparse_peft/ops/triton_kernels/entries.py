"""Writing entries of weights: many tensors in one launch, and sums rounded once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def scatter_add_kernel(weight, indices, values, entries, BLOCK: tl.constexpr):
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = e < entries
    at = weight + tl.load(indices + e, inside, 0).to(tl.int64)
    old = tl.load(at, inside, 0.0)
    total = old.to(tl.float32) + tl.load(values + e, inside, 0.0).to(tl.float32)
    tl.store(at, total.to(old.dtype), inside)


@triton.jit
def write_many_kernel(table, tensors, weight_like, index_like, value_like, MODE: tl.constexpr, BLOCK: tl.constexpr):
    # `table` has, for each tensor, the addresses of weight, indices, originals and values, and the number of entries;
    # the `_like` arguments are there for their types alone
    tensor = tl.program_id(1)
    entries = tl.load(table + 4 * tensors + tensor)
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = e < entries
    weight = tl.load(table + tensor).to(weight_like.dtype)
    indices = tl.load(table + tensors + tensor).to(index_like.dtype)
    originals = tl.load(table + 2 * tensors + tensor).to(weight_like.dtype)
    at = weight + tl.load(indices + e, inside, 0).to(tl.int64)
    if MODE == "take":
        tl.store(originals + e, tl.load(at, inside, 0.0), inside)
    else:
        original = tl.load(originals + e, inside, 0.0)
        if MODE == "resync":
            values = tl.load(table + 3 * tensors + tensor).to(value_like.dtype)
            total = original.to(tl.float32) + tl.load(values + e, inside, 0.0).to(tl.float32)
            tl.store(at, total.to(original.dtype), inside)
        else:
            tl.store(at, original, inside)


def scatter_add_(weight: Tensor, indices: Tensor, values: Tensor) -> None:
    """``weight.flat[indices] += values``, the sums in float32; ``weight`` is contiguous."""
    entries = indices.numel()
    scatter_add_kernel[(triton.cdiv(entries, BLOCK),)](weight, indices, values, entries, BLOCK=BLOCK)


def write_many_(
    table: Tensor, largest: int, weight: Tensor, indices: Tensor, values: Tensor | None, mode: str
) -> None:
    """Read or write the entries of all tensors of a table; ``weight``, ``indices``, ``values`` give the types."""
    tensors = table.shape[1]
    write_many_kernel[(triton.cdiv(largest, BLOCK), tensors)](
        table, tensors, weight, indices, weight if values is None else values,
        MODE=mode, BLOCK=BLOCK,
    )  # fmt: skip


def signatures(dtype: torch.dtype) -> list[tuple]:
    """What to compile ahead of time: ``(kernel, argument types, constants)``."""
    w = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}[dtype]
    add = {"weight": w, "indices": "*i32", "values": "*fp32", "entries": "i32"}
    many = {"table": "*i64", "tensors": "i32", "weight_like": w, "index_like": "*i32", "value_like": "*fp32"}
    return [(scatter_add_kernel, add, {"BLOCK": BLOCK})] + [
        (write_many_kernel, many, {"MODE": mode, "BLOCK": BLOCK}) for mode in ("take", "resync", "restore")
    ]
