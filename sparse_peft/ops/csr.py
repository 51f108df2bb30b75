"""Torch's CSR matrices, without the notice that they are in beta, and their product."""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor


@functools.cache
def _silence_beta_notice() -> None:
    # torch gives the notice once a process, at the first matrix; made here, it is caught
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.zeros(2, dtype=torch.int32), torch.zeros(0, dtype=torch.int32), [], size=(1, 1))


def csr_matrix(row_ptr: Tensor, cols: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """A CSR matrix over a support that was checked before: ``(rows + 1,)``, ``(entries,)``, ``(entries,)``."""
    _silence_beta_notice()
    return torch.sparse_csr_tensor(row_ptr, cols, values, size=shape, check_invariants=False)


def csr_product(matrix: Tensor, dense: Tensor) -> Tensor:
    """``matrix @ dense`` in their own dtype: autocast would ask for one in bfloat16, which torch does not have."""
    with torch.autocast(dense.device.type, enabled=False):
        return matrix @ dense
