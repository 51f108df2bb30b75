"""Writing entries of weights: many tensors in one launch, and sums that are rounded once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import Variant

BLOCK = 1024


@triton.jit
def scatter_add_kernel(
    weight: tl.tensor, indices: tl.tensor, values: tl.tensor, entries: tl.tensor, BLOCK: tl.constexpr
) -> None:
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = e < entries
    at = weight + tl.load(indices + e, inside, 0).to(tl.int64)
    old = tl.load(at, inside, 0.0)
    total = old.to(tl.float32) + tl.load(values + e, inside, 0.0).to(tl.float32)
    tl.store(at, total.to(old.dtype), inside)


@triton.jit
def write_many_kernel(
    table: tl.tensor,
    tensors: tl.tensor,
    weight_like: tl.tensor,
    index_like: tl.tensor,
    value_like: tl.tensor,
    MODE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    # `table` has the addresses of weight, indices, originals and values, and the number of entries of each tensor; the
    # `_like` arguments only pass types
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
    """Read or write the entries of all tensors of a table.

    Args:
        table: ``(5, tensors)`` int64: addresses of weight, indices, originals and values, and the number of entries.
        largest: maximum entry count of any tensor.
        weight: any of the weights, for its dtype.
        indices: any of the positions, for their dtype.
        values: any of the deltas, for ``"resync"``.
        mode: as in ``sparse_peft.ops.entries``.
    """
    tensors = table.shape[1]
    write_many_kernel[(triton.cdiv(largest, BLOCK), tensors)](
        table, tensors, weight, indices, weight if values is None else values,
        MODE=mode, BLOCK=BLOCK,
    )  # fmt: skip


def signatures(dtype: torch.dtype) -> list[Variant]:
    """The variants to compile ahead of time: ``(kernel, argument types, constants)``."""
    w = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}[dtype]
    add = {"weight": w, "indices": "*i32", "values": "*fp32", "entries": "i32"}
    many = {"table": "*i64", "tensors": "i32", "weight_like": w, "index_like": "*i32", "value_like": "*fp32"}
    return [(scatter_add_kernel, add, {"BLOCK": BLOCK})] + [
        (write_many_kernel, many, {"MODE": mode, "BLOCK": BLOCK}) for mode in ("take", "resync", "restore")
    ]
