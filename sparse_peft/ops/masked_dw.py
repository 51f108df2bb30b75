"""The entries of a dense weight gradient at a support, and the largest of all others.

The whole gradient is never in memory. On a GPU, tiles are formed in registers, and gradients that are not below a
threshold are appended to a list. The threshold is estimated from a sample of the gradient. With too few or too many
found, it is adjusted and the list is built again, so the result is exact.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..numerics import RunningTopK, topk_indices
from ..numerics.tokens import accumulation_dtype
from ..support import Support
from . import triton_kernels
from .backends import kernel_backend, log_once
from .gradient_paths import gradient_panels
from .one_hot import Factor, FoundRows, OneHot

# Memory per weight of a panel, in bytes: the panel, its absolute values and the temporaries of top-k, in float32.
PANEL_BYTES_PER_WEIGHT = 12
WORD_BITS = 32
SAMPLE_ROWS = 128
# Capacity of the list, relative to the wanted number: the threshold of the sample is accurate to a few percent.
CAPACITY = 4
ATTEMPTS = 3


def bitmap(support: Support) -> tuple[Tensor, Tensor]:
    """One bit per weight, and the number of entries before each word of 32 bits: ``(rows, words)`` int32 each."""
    rows, cols = support.shape
    words_a_row = -(-cols // WORD_BITS)
    word = support.rows.long() * words_a_row + torch.div(support.cols, WORD_BITS, rounding_mode="floor")
    words = torch.zeros(rows * words_a_row, dtype=torch.int64, device=support.device)
    words.index_add_(0, word, torch.ones_like(word) << (support.cols.long() % WORD_BITS))
    words = torch.where(words >= 2**31, words - 2**32, words)
    every = torch.arange(rows * words_a_row, device=support.device)
    before = torch.searchsorted(word, every, out_int32=True)
    return words.to(torch.int32).view(rows, words_a_row), before.view(rows, words_a_row)


def _by_panels(left: Factor, right: Tensor, support: Support, limit: int) -> tuple[Tensor, Tensor, Tensor]:
    rows, cols = support.shape
    dtype = accumulation_dtype(right.dtype)
    values = torch.empty(support.nnz, dtype=dtype, device=left.device)
    best = RunningTopK(limit)
    finite = True
    panels = gradient_panels([(left, right)], (rows, cols), PANEL_BYTES_PER_WEIGHT * dtype.itemsize // 4)
    for start, stop, panel in panels:
        flat = panel.reshape(-1)
        part, first, last = support.of_rows(start, stop)
        local = part.indices
        values[first:last] = flat[local]
        scores = flat.abs()
        scores[local] = -1  # below all others
        finite = finite and bool(scores.amax().isfinite())
        if finite:
            best.update_block(scores, start * cols, flat)
    positions, _ = best.result()
    found = best.payload()
    if not finite:
        positions = torch.arange(limit, device=left.device)
        found = torch.full((limit,), torch.nan, dtype=dtype, device=left.device)
    return values, positions.to(left.device), found.to(left.device)


def _by_rows(left: OneHot, right: Tensor, support: Support, limit: int) -> tuple[Tensor, Tensor, Tensor]:
    found = FoundRows.of(left, support)
    rows, cols = found.support.shape
    if rows == 0:
        nothing = right.new_zeros(0, dtype=accumulation_dtype(right.dtype))
        return nothing.new_zeros(support.nnz), nothing.long(), nothing
    inner = min(limit, rows * cols - found.support.nnz)
    own, positions, others = _by_panels(found.left, right, found.support, inner)
    values = own.new_zeros(support.nnz).index_copy_(0, found.entries, own)
    return values, found.positions_in_whole(positions), others


def _threshold(left: Tensor, right: Tensor, support: Support, limit: int) -> Tensor:
    """A magnitude that about ``1.5 * limit`` weights outside the support reach, estimated from a sample of rows."""
    rows, cols = support.shape
    step = max(1, rows // SAMPLE_ROWS)
    sampled = torch.arange(step // 2, rows, step, device=left.device)
    sample = (left.index_select(1, sampled).float().t() @ right.float()).abs().reshape(-1)
    rank = math.ceil(1.5 * (limit + support.nnz) * sample.numel() / (rows * cols)) + 8
    if rank >= sample.numel():
        return torch.zeros(1, device=left.device)
    return torch.topk(sample, rank, sorted=False).values.amin().reshape(1)


def _by_kernel(left: Tensor, right: Tensor, support: Support, limit: int) -> tuple[Tensor, Tensor, Tensor] | None:
    kernels = triton_kernels.kernels("masked_dw")
    left, right = left.contiguous(), right.contiguous()
    values = torch.empty(support.nnz, dtype=torch.float32, device=left.device)
    words, before = bitmap(support)
    threshold = _threshold(left, right, support, limit)
    others = support.shape[0] * support.shape[1] - support.nnz
    for _ in range(ATTEMPTS):
        capacity = min(CAPACITY * limit + 1024, others)
        counter, positions, found = kernels.masked_dw(left, right, words, before, values, threshold, capacity)
        count = int(counter)
        if limit <= count <= capacity:
            order = positions[:count].argsort()
            positions, found = positions[:count][order], found[:count][order]
            if not bool(found.isfinite().all()):
                break
            keep = topk_indices(found.abs(), limit)
            return values, positions[keep], found[keep]
        if count < limit:
            threshold = threshold / 2 if float(threshold) > 1e-30 else torch.zeros_like(threshold)
        else:
            threshold = threshold * 1.5 if float(threshold) > 0 else torch.full_like(threshold, 1e-30)
    log_once("the candidates of some layers were found in panels: their gradients have no useful threshold")
    return None


def masked_dw(left: Factor, right: Tensor, support: Support, limit: int) -> tuple[Tensor, Tensor, Tensor]:
    """The entries of ``left.T @ right`` at a support, and the ``limit`` other entries of largest magnitude.

    Among equal magnitudes the lowest positions win. If any other entry is not finite, all found gradients are NaN.

    Args:
        left: ``(tokens, rows)``; one-hot for an embedding's ids.
        right: ``(tokens, cols)``, same dtype.
        support: of the weight ``(rows, cols)``.
        limit: number of other entries.

    Returns:
        ``(entries,)`` gradients at the support, ``(limit,)`` int64 positions of the others, ascending, and their
        ``(limit,)`` gradients; gradients in float32 (float64 for float64 inputs). With a one-hot ``left`` they are
        fewer where the rows that occur have fewer: all others are zero.

    Raises:
        ValueError: ``limit`` is out of range.
    """
    rows, cols = support.shape
    if not 0 <= limit <= rows * cols - support.nnz:
        raise ValueError(f"limit={limit}: between 0 and {rows * cols - support.nnz} positions are outside the support")
    if isinstance(left, OneHot):
        return _by_rows(left, right, support, limit)
    if limit and left.shape[0] and kernel_backend("masked_dw", left.dtype, left.device) == "triton":
        result = _by_kernel(left, right, support, limit)
        if result is not None:
            return result
    return _by_panels(left, right, support, limit)
