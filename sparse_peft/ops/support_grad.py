"""The gradient of a weight matrix at the entries of a support, without the dense gradient.

For a stored weight ``(rows, cols)`` whose product gives the dense gradient ``left.T @ right``, the op returns
``(left.T @ right)[row, col]`` for the support's entries only (a sampled dense-dense product, "SDDMM").
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .csr import csr_matrix
from .dispatch import support_grad_backend
from .observe import UNOBSERVED, observer_of
from .panels import panels

# Tokens in a tile of the sampled product; 64 to 256 measured fastest, on 576 to 2,048 wide layers, at 0.1 to 5 %.
SAMPLED_TILE = 128


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for the half precisions, else the dtype itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _sampled(left: Tensor, right: Tensor, row_ptr: Tensor, cols: Tensor, shape: tuple[int, int]) -> Tensor:
    dtype = accumulation_dtype(left.dtype)
    # The stock kernel copies both operands: tiles of tokens keep the copies small, and in the cache.
    tiles = panels(left.shape[0], (left.shape[1] + right.shape[1]) * dtype.itemsize, SAMPLED_TILE)
    values = torch.zeros(cols.numel(), dtype=dtype, device=left.device)
    product = csr_matrix(row_ptr, cols, values, shape)
    for start, stop in tiles:
        product = torch.sparse.sampled_addmm(
            product, left[start:stop].to(dtype).t(), right[start:stop].to(dtype), beta=0.0 if start == 0 else 1.0
        )
    return product.values()


def _panel_product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """``left.T @ right`` in ``dtype``; natively where the device accumulates halves in float32."""
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
        left, right, shape: as in :func:`support_grad`.
        bytes_per_weight: of all that is made of a panel, its own included; its own if None.

    Yields:
        ``(first row, last row + 1, (rows, cols) panel)`` in float32 (float64 for float64 inputs).
    """
    dtype = accumulation_dtype(left.dtype)
    rows, cols = shape
    for start, stop in panels(rows, cols * (bytes_per_weight or dtype.itemsize)):
        yield start, stop, _panel_product(left[:, start:stop], right, dtype)


def _panels(left: Tensor, right: Tensor, row_ptr: Tensor, indices: Tensor, shape: tuple[int, int]) -> Tensor:
    dtype = accumulation_dtype(left.dtype)
    rows, cols = shape
    values = torch.zeros(indices.numel(), dtype=dtype, device=left.device)
    bounds = panels(rows, cols * dtype.itemsize)
    offsets = row_ptr[[start for start, _ in bounds] + [rows]].tolist()
    for (start, stop), first, last in zip(bounds, offsets[:-1], offsets[1:]):
        if first < last:
            panel = _panel_product(left[:, start:stop], right, dtype)
            values[first:last] = panel.reshape(-1).index_select(0, indices[first:last] - start * cols)
    return values


def support_grad(
    left: Tensor, right: Tensor, row_ptr: Tensor, cols: Tensor, indices: Tensor, shape: tuple[int, int]
) -> Tensor:
    """``(left.T @ right)`` at the entries of a support.

    Args:
        left: ``(tokens, rows)``: what multiplies a row (the output gradient of a Linear layer).
        right: ``(tokens, cols)``, same dtype (the input of a Linear layer).
        row_ptr: ``(rows + 1,)`` CSR row pointers of the support.
        cols: ``(entries,)`` column of each entry.
        indices: ``(entries,)`` flat row-major positions, sorted.
        shape: ``(rows, cols)`` of the stored weight.

    Returns:
        ``(entries,)`` in float32 (float64 for float64 inputs).
    """
    rows, columns = shape
    entries = indices.numel()
    if left.shape[0] == 0 or entries == 0:
        return torch.zeros(entries, dtype=accumulation_dtype(left.dtype), device=left.device)
    if support_grad_backend(entries / (rows * columns), left.device) == "sampled":
        return _sampled(left, right, row_ptr, cols, shape)
    return _panels(left, right, row_ptr, indices, shape)


def observed_support_grad(
    left: Tensor,
    right: Tensor,
    row_ptr: Tensor,
    cols: Tensor,
    indices: Tensor,
    shape: tuple[int, int],
    key: int = UNOBSERVED,
) -> Tensor:
    """:func:`support_grad`, by way of the observer under ``key`` if there is one."""
    observer = observer_of(key)
    if observer is None:
        return support_grad(left, right, row_ptr, cols, indices, shape)
    # backward may run inside the caller's autocast, which would round the observer's products
    with torch.autocast(left.device.type, enabled=False):
        return observer.support_grad(left, right, row_ptr, cols, indices, shape)


@torch.library.custom_op("sparse_peft::support_grad", mutates_args=())
def support_grad_op(
    left: Tensor, right: Tensor, row_ptr: Tensor, cols: Tensor, indices: Tensor, rows: int, columns: int, key: int
) -> Tensor:
    """:func:`observed_support_grad` as one node of a compiled graph."""
    return observed_support_grad(left, right, row_ptr, cols, indices, (rows, columns), key)


@support_grad_op.register_fake
def _(left, right, row_ptr, cols, indices, rows, columns, key):
    return left.new_empty(indices.shape, dtype=accumulation_dtype(left.dtype))
