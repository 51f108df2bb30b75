"""PyTorch's CSR matrices, without the warning about their beta state, and their product."""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor


@functools.cache
def _silence_beta_notice() -> None:
    # torch warns once per process, at the first matrix, which is created here
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.zeros(2, dtype=torch.int32), torch.zeros(0, dtype=torch.int32), [], size=(1, 1))


def csr_matrix(row_ptr: Tensor, cols: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """A CSR matrix, without checks.

    Args:
        row_ptr: ``(rows + 1,)`` row pointers.
        cols: ``(entries,)`` column of each entry.
        values: ``(entries,)``.
        shape: ``(rows, cols)``.
    """
    _silence_beta_notice()
    return torch.sparse_csr_tensor(row_ptr, cols, values, size=shape, check_invariants=False)


def csr_product(matrix: Tensor, dense: Tensor) -> Tensor:
    """``matrix @ dense`` in their own dtype: under autocast torch would need a bfloat16 product, which it lacks."""
    with torch.autocast(dense.device.type, enabled=False):
        return matrix @ dense
