"""The paths that compute a weight gradient at the entries of a support.

For a stored weight ``(rows, cols)`` with the dense gradient ``left.T @ right``, each path returns the entries
``(left.T @ right)[row, col]`` of a support (a sampled dense-dense product). ``plans`` chooses the path.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..numerics.panels import panels
from ..numerics.tokens import accumulation_dtype, transposed_product
from ..support import Layout, Support, layout_of
from . import cuda_kernels, triton_kernels
from .backends import kernel_backend
from .csr import csr_matrix
from .one_hot import Factor, OneHot, panel_of_rows
from .transposed import token_contiguous

# Tokens in a tile of the sampled product; 64 to 256 measured fastest, on 576 to 2,048 wide layers, at 0.1 to 5 %.
SAMPLED_TILE = 128
# Fewer tokens than a register of the CPU has numbers take torch's sampled product up to ten times as long as many.
REGISTER_BYTES = 64 if "512" in torch.backends.cpu.get_cpu_capability() else 32
# Tokens in a tile of row groups: only this many tokens of the input are transposed at a time.
GROUPS_TILE = 512
# Tokens in a tile of the kernels: 8 MB of a 4,096 wide activation in bfloat16, which fits a GPU's L2 cache.
KERNEL_TILE = 1024
# With more groups than this, one launch per group takes a GPU longer than one dense product.
MAX_GROUPS_ON_CUDA = 16


def gradient_panels(
    pairs: Sequence[tuple[Factor, Tensor]], shape: tuple[int, int], bytes_per_weight: int | None = None
) -> Iterator[tuple[int, int, Tensor]]:
    """The dense gradient, the sum of ``left.T @ right`` over pairs, one panel of rows at a time.

    Args:
        pairs: ``(tokens, rows)``, which may be one-hot, and ``(tokens, cols)`` of each call of the layer.
        shape: ``(rows, cols)`` of the stored weight.
        bytes_per_weight: memory per weight of a panel and of everything made from it; by default the panel's own.

    Yields:
        ``(first row, last row + 1, (rows, cols) panel)`` in float32 (float64 for float64 inputs).
    """
    rows, cols = shape
    itemsize = accumulation_dtype(pairs[0][1].dtype).itemsize
    for start, stop in panels(rows, cols * (bytes_per_weight or itemsize)):
        panel = _panel(*pairs[0], start, stop)
        for left, right in pairs[1:]:
            panel += _panel(left, right, start, stop)
        yield start, stop, panel


def _panel(left: Factor, right: Tensor, start: int, stop: int) -> Tensor:
    if isinstance(left, OneHot):
        return panel_of_rows(left, right, start, stop)
    return transposed_product(left[:, start:stop], right)


def _by_sampling(left: Tensor, right: Tensor, support: Support) -> Tensor:
    values = torch.zeros(support.nnz, dtype=accumulation_dtype(left.dtype), device=left.device)
    sample_(values, left, right, [TokenGroups(support, 0, [(0, left.shape[0])])])
    return values


class TokenGroups(NamedTuple):
    """Consecutive groups of tokens whose gradients are those of matrices one above the other, such as of experts.

    Attributes:
        support: of the entries, in the matrices ``(groups * rows, cols)``.
        first: the number of the first entry.
        bounds: of each group the first token, and the one after the last.
    """

    support: Support
    first: int
    bounds: Sequence[tuple[int, int]]


def sample_(values: Tensor, left: Tensor, right: Tensor, parts: Iterable[TokenGroups]) -> None:
    """Add the sampled products of groups of tokens to their entries.

    The groups of a part share one product, in which each has as many tokens as the longest: zeros take the place of
    those that it lacks.

    Args:
        values: ``(entries,)`` of all parts, in ``accumulation_dtype``.
        left: ``(tokens, rows)`` of all parts.
        right: ``(tokens, cols)`` of all parts.
        parts: of the products.
    """
    rows, cols, dtype = left.shape[1], right.shape[1], values.dtype
    step, least = sampled_tile(rows, cols, dtype)
    # The stock kernel reads both operands with their tokens contiguous, and copies them otherwise. One buffer for all
    # tiles stays in the cache; fresh memory for each would be paged in anew.
    buffer = values.new_empty(0)
    for support, first, bounds in parts:
        product = _product_of(support, values[first : first + support.nnz], len(bounds), cols)
        for tile in _tiles(bounds, step):
            width = max(least, *(end - start for start, end in tile))
            size = len(tile) * (rows + cols) * width
            buffer = buffer if buffer.numel() >= size else buffer.new_empty(size)
            a = _turned(buffer, left, tile, width)
            b = _turned(buffer[a.numel() :], right, tile, width)
            torch.sparse.sampled_addmm(product, a, b.t(), out=product)


def _tiles(bounds: Sequence[tuple[int, int]], step: int) -> Iterator[Sequence[tuple[int, int]]]:
    """Parts of the only group, or all groups."""
    if len(bounds) > 1:
        yield bounds
        return
    ((begin, end),) = bounds
    for start in range(begin, end, step):
        yield [(start, min(start + step, end))]


def _turned(buffer: Tensor, x: Tensor, bounds: Sequence[tuple[int, int]], width: int) -> Tensor:
    """``(groups * features, width)`` in a buffer: the groups' transposed tokens, and zeros."""
    groups, features = len(bounds), x.shape[1]
    turned = buffer[: groups * features * width].view(-1, width)
    if groups > 1:
        tokens = pad_sequence([x[start:end] for start, end in bounds], batch_first=True)
        return _fill_(turned.view(groups, features, width), tokens.transpose(1, 2)).view(-1, width)
    ((start, end),) = bounds
    return _fill_(turned, x[start:end].t())  # a matrix is copied faster than several


def _fill_(out: Tensor, tokens: Tensor) -> Tensor:
    count = tokens.shape[-1]
    if count < out.shape[-1]:
        out.zero_()
        out[..., :count].copy_(tokens)
        return out
    return out.copy_(tokens)


def sampled_tile(rows: int, cols: int, dtype: torch.dtype) -> tuple[int, int]:
    """Most and least tokens in a tile of the sampled product of a matrix."""
    most = panels(SAMPLED_TILE, (rows + cols) * dtype.itemsize)[0][1]
    return most, min(most, REGISTER_BYTES // dtype.itemsize)


def _product_of(support: Support, values: Tensor, groups: int, cols: int) -> Tensor:
    """The CSR matrix of several matrices one above the other, each of which has columns of its own."""
    pointers, columns = support.row_ptr, support.cols
    if groups > 1:
        bounds = pointers[:: support.shape[0] // groups].tolist()
        own, columns = columns, torch.empty_like(columns)
        for number, (first, last) in enumerate(itertools.pairwise(bounds)):
            torch.add(own[first:last], number * cols, out=columns[first:last])
    return csr_matrix(pointers, columns, values, (support.shape[0], groups * cols))


def _by_panels(left: Tensor, right: Tensor, layout: Layout) -> Tensor:
    dtype, support = accumulation_dtype(left.dtype), layout.inner
    rows, cols = support.shape
    bounds = panels(rows, cols * dtype.itemsize)
    if len(bounds) == 1:
        return transposed_product(left, right).view(-1).index_select(0, support.indices)
    values = torch.zeros(support.nnz, dtype=dtype, device=left.device)
    for (start, stop), (first, last) in zip(bounds, support.entry_ranges(bounds), strict=True):
        if first < last:
            panel = transposed_product(left[:, start:stop], right)
            within = support.part(start, stop, first, last).indices
            values[first:last] = panel.reshape(-1).index_select(0, within)
    return values


def _by_tiles(left: Tensor, right: Tensor, layout: Layout) -> Tensor:
    many = len(layout.groups) > MAX_GROUPS_ON_CUDA and left.is_cuda
    if many and kernel_backend("support_grad_tiles", left.dtype, left.device):
        values = torch.empty(layout.inner.nnz, dtype=torch.float32, device=left.device)
        kernels = triton_kernels.kernels("support_grad_tiles")
        kernels.support_grad_tiles_(values, left.contiguous(), right.contiguous(), *layout.work(kernels.work_list))
        return values
    dtype = accumulation_dtype(left.dtype)
    values = torch.zeros(layout.inner.nnz, dtype=dtype, device=left.device)
    bytes_per_token = 2 * (left.shape[1] + right.shape[1]) * dtype.itemsize
    for start, stop in panels(left.shape[0], bytes_per_token, GROUPS_TILE):
        _add_groups_(values, left[start:stop].to(dtype), right[start:stop].to(dtype), layout)
    return values


def _add_groups_(values: Tensor, left: Tensor, right: Tensor, layout: Layout) -> None:
    """Add the product of each row group over a tile of tokens."""
    widths = [group.cols.numel() for group in layout.groups if group.cols is not None]
    # rows of the transposed activation are copied whole; for a few columns the transposition would cost more
    turned = None
    if sum(widths) > right.shape[1]:
        turned = token_contiguous(right, right.dtype)[:, : right.shape[0]]
    # one buffer for all groups: fresh memory for each would be paged in anew
    buffer = right.new_empty(0 if turned is None else max(widths), right.shape[0])
    for group in layout.groups:
        out = values[group.first : group.last].view(group.stop - group.start, -1)
        if group.cols is None:
            columns = right.t()
        elif turned is None:
            columns = right.index_select(1, group.cols).t()
        else:
            columns = torch.index_select(turned, 0, group.cols, out=buffer[: group.cols.numel()])
        # many rows by few columns: a CPU shares this product between its threads better than the transposed one
        out += (columns @ left[:, group.start : group.stop]).t()


def _by_kernel(path: str, left: Tensor, right: Tensor, support: Support) -> Tensor:
    values = torch.empty(support.nnz, dtype=torch.float32, device=left.device)
    kernels = cuda_kernels if path == "cuda" else triton_kernels.kernels("support_grad")
    tiles = panels(left.shape[0], (left.shape[1] + right.shape[1]) * left.element_size(), KERNEL_TILE)
    for start, stop in tiles:
        a = token_contiguous(left[start:stop], left.dtype)
        b = token_contiguous(right[start:stop], right.dtype, shared=True)
        kernels.support_grad_(values, a, b, support.indices, support.shape[1], add=start > 0)
    return values


def grad_by_path(path: str, left: Tensor, right: Tensor, support: Support) -> Tensor:
    """``(left.T @ right)`` at the entries of a support, by one path.

    Args:
        path: one of ``BACKENDS`` other than ``"auto"``.
        left: ``(tokens, rows)``.
        right: ``(tokens, cols)``, same dtype.
        support: of the stored weight ``(rows, cols)``.

    Returns:
        ``(entries,)`` in float32 (float64 for float64 inputs).
    """
    if path == "sampled":
        return _by_sampling(left, right, support)
    if path in ("triton", "cuda"):
        return _by_kernel(path, left, right, support)
    layout = layout_of(support)
    dense = _by_panels if path == "panels" else _by_tiles
    if layout.rows is None and layout.cols is None:
        return dense(left, right, layout)
    # rows and columns without entries are left out, for one panel of tokens at a time
    values = torch.zeros(support.nnz, dtype=accumulation_dtype(left.dtype), device=left.device)
    for start, stop in panels(left.shape[0], sum(layout.inner.shape) * left.element_size()):
        a, b = left[start:stop], right[start:stop]
        a = a if layout.rows is None else a.index_select(1, layout.rows)
        b = b if layout.cols is None else b.index_select(1, layout.cols)
        values += dense(a, b, layout)
    return values
