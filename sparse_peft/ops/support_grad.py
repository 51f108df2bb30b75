"""The gradient of a weight matrix at the entries of a support, without the dense gradient.

For a stored weight ``(rows, cols)`` whose product gives the dense gradient ``left.T @ right``, the op returns
``(left.T @ right)[row, col]`` for the support's entries only (a sampled dense-dense product, "SDDMM").
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..numerics.panels import panels
from ..support import ChannelSupport, Layout, Support, layout_of
from . import cuda_kernels, triton_kernels
from .csr import csr_matrix
from .gradient_observers import UNOBSERVED, observer_of
from .plans import MAX_GROUPS_ON_CUDA, kernel_backend, plan_support_grad
from .transposed import token_contiguous

# Tokens in a tile of the sampled product; 64 to 256 measured fastest, on 576 to 2,048 wide layers, at 0.1 to 5 %.
SAMPLED_TILE = 128
# Tokens in a tile of row groups: the transposed copy of so many of the input's is all that is alive of it.
GROUPS_TILE = 512
# Tokens in a tile of the kernels: of a 4,096 wide activation in bfloat16 8 MB, which a GPU's second cache holds.
KERNEL_TILE = 1024


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for the half precisions, else the dtype itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _sampled(left: Tensor, right: Tensor, support: Support) -> Tensor:
    dtype = accumulation_dtype(left.dtype)
    (rows, cols), device = support.shape, left.device
    tiles = panels(left.shape[0], (rows + cols) * dtype.itemsize, SAMPLED_TILE)
    product = csr_matrix(
        support.row_ptr, support.cols, torch.zeros(support.nnz, dtype=dtype, device=device), support.shape
    )
    # The stock kernel reads both operands with their tokens contiguous, and copies them if they lie otherwise. One
    # buffer for the tiles of all tokens stays in the cache; fresh memory for each would be paged in anew.
    buffer = torch.empty((rows + cols) * tiles[0][1], dtype=dtype, device=device)
    for start, stop in tiles:
        tokens = stop - start
        a = buffer[: rows * tokens].view(rows, tokens).copy_(left[start:stop].t())
        b = buffer[rows * tokens : (rows + cols) * tokens].view(cols, tokens).copy_(right[start:stop].t())
        torch.sparse.sampled_addmm(product, a, b.t(), out=product)
    return product.values()


def dense_grad(left: Tensor, right: Tensor) -> Tensor:
    """``left.T @ right`` in float32 (float64 for float64); natively where the device accumulates halves so."""
    dtype = accumulation_dtype(left.dtype)
    if left.dtype == dtype:
        return left.t() @ right
    if left.is_cuda:
        return torch.mm(left.t(), right, out_dtype=dtype)
    product = torch.zeros(left.shape[1], right.shape[1], dtype=dtype, device=left.device)
    for start, stop in panels(left.shape[0], max(left.shape[1], right.shape[1]) * dtype.itemsize):
        product.addmm_(left[start:stop].to(dtype).t(), right[start:stop].to(dtype))
    return product


def gradient_panels(
    left: Tensor, right: Tensor, shape: tuple[int, int], bytes_per_weight: int | None = None
) -> Iterator[tuple[int, int, Tensor]]:
    """The dense gradient ``left.T @ right``, a block of rows at a time.

    Args:
        left, right: as in ``support_grad``.
        shape: ``(rows, cols)`` of the stored weight.
        bytes_per_weight: of all that is made of a panel, its own included; its own if None.

    Yields:
        ``(first row, last row + 1, (rows, cols) panel)`` in float32 (float64 for float64 inputs).
    """
    dtype = accumulation_dtype(left.dtype)
    rows, cols = shape
    for start, stop in panels(rows, cols * (bytes_per_weight or dtype.itemsize)):
        yield start, stop, dense_grad(left[:, start:stop], right)


def _panels(left: Tensor, right: Tensor, layout: Layout) -> Tensor:
    dtype, support = accumulation_dtype(left.dtype), layout.inner
    rows, cols = support.shape
    values = torch.zeros(support.nnz, dtype=dtype, device=left.device)
    bounds = panels(rows, cols * dtype.itemsize)
    for (start, stop), (first, last) in zip(bounds, support.entry_ranges(bounds), strict=True):
        if first < last:
            panel = dense_grad(left[:, start:stop], right)
            values[first:last] = panel.reshape(-1).index_select(0, support.indices[first:last] - start * cols)
    return values


def _tiles(left: Tensor, right: Tensor, layout: Layout) -> Tensor:
    groups, kept = layout.groups, layout.inner
    if len(groups) > MAX_GROUPS_ON_CUDA and left.is_cuda and kernel_backend("groups", left.dtype, left.device):
        values = torch.empty(kept.nnz, dtype=torch.float32, device=left.device)
        kernels = triton_kernels.kernels("groups")
        kernels.groups_(values, left.contiguous(), right.contiguous(), *layout.work(kernels.work_list))
        return values
    dtype = accumulation_dtype(left.dtype)
    values = torch.zeros(kept.nnz, dtype=dtype, device=left.device)
    widths = [group.cols.numel() for group in groups if group.cols is not None]
    bytes_per_token = 2 * (left.shape[1] + right.shape[1]) * dtype.itemsize
    for first_token, last_token in panels(left.shape[0], bytes_per_token, GROUPS_TILE):
        a, b = left[first_token:last_token].to(dtype), right[first_token:last_token].to(dtype)
        # rows of the transposed activation are copied whole; for a few columns the transposition would cost more
        turned = token_contiguous(b, dtype)[:, : b.shape[0]] if sum(widths) > right.shape[1] else None
        # one buffer for all groups: fresh memory for each would be paged in anew
        buffer = torch.empty(0 if turned is None else max(widths), b.shape[0], dtype=dtype, device=b.device)
        for group in groups:
            out = values[group.first : group.last].view(group.stop - group.start, -1)
            if group.cols is None:
                columns = b.t()
            elif turned is None:
                columns = b.index_select(1, group.cols).t()
            else:
                columns = torch.index_select(turned, 0, group.cols, out=buffer[: group.cols.numel()])
            # a product of many rows and few columns, which a CPU shares better between its threads than the reverse
            out += (columns @ a[:, group.start : group.stop]).t()
    return values


def _kernel(path: str, left: Tensor, right: Tensor, support: Support) -> Tensor:
    values = torch.empty(support.nnz, dtype=torch.float32, device=left.device)
    run = cuda_kernels.sddmm_ if path == "cuda" else triton_kernels.kernels("sddmm").sddmm_
    tiles = panels(left.shape[0], (left.shape[1] + right.shape[1]) * left.element_size(), KERNEL_TILE)
    for start, stop in tiles:
        a = token_contiguous(left[start:stop], left.dtype)
        b = token_contiguous(right[start:stop], right.dtype, shared=True)
        run(values, a, b, support.indices, support.shape[1], add=start > 0)
    return values


def grad_by_path(path: str, left: Tensor, right: Tensor, support: Support) -> Tensor:
    """``support_grad`` by one of the paths of ``BACKENDS``."""
    if path == "sampled":
        return _sampled(left, right, support)
    if path in ("triton", "cuda"):
        return _kernel(path, left, right, support)
    layout = layout_of(support)
    dense = _panels if path == "panels" else _tiles
    if layout.rows is None and layout.cols is None:
        return dense(left, right, layout)
    # rows and columns without entries are left out, of no more tokens at a time than a panel holds
    values = torch.zeros(support.nnz, dtype=accumulation_dtype(left.dtype), device=left.device)
    for start, stop in panels(left.shape[0], sum(layout.inner.shape) * left.element_size()):
        a, b = left[start:stop], right[start:stop]
        a = a if layout.rows is None else a.index_select(1, layout.rows)
        b = b if layout.cols is None else b.index_select(1, layout.cols)
        values += dense(a, b, layout)
    return values


def support_grad(left: Tensor, right: Tensor, support: Support) -> Tensor:
    """``(left.T @ right)`` at the entries of a support.

    Args:
        left: ``(tokens, rows)``: what multiplies a row (the output gradient of a Linear layer).
        right: ``(tokens, cols)``, same dtype (the input of a Linear layer).
        support: of the stored weight ``(rows, cols)``.

    Returns:
        ``(entries,)`` in float32 (float64 for float64 inputs).
    """
    if left.shape[0] == 0 or support.nnz == 0:
        return torch.zeros(support.nnz, dtype=accumulation_dtype(left.dtype), device=left.device)
    if isinstance(support, ChannelSupport):
        if support.dim == 0:
            return dense_grad(left.index_select(1, support.lines), right).reshape(-1)
        return dense_grad(left, right.index_select(1, support.lines)).reshape(-1)
    return grad_by_path(plan_support_grad(support, left.dtype, left.device).path, left, right, support)


def observed_support_grad(left: Tensor, right: Tensor, support: Support, key: int = UNOBSERVED) -> Tensor:
    """``support_grad``, by way of the observer under ``key`` if there is one."""
    observer = observer_of(key)
    if observer is None:
        return support_grad(left, right, support)
    # backward may run inside the caller's autocast, which would round the observer's products
    with torch.autocast(left.device.type, enabled=False):
        return observer.support_grad(left, right, support)
