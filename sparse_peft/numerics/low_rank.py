"""The best approximation of a matrix by a low rank, from products with the matrix alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ITERATIONS = 4


def principal_factors(
    multiply: Callable[[Tensor], Tensor],
    multiply_transposed: Callable[[Tensor], Tensor],
    shape: tuple[int, int],
    rank: int,
    *,
    seed: int = 0,
    like: Tensor,
) -> tuple[Tensor, Tensor]:
    """The best rank-``rank`` approximation of a matrix, by randomised subspace iteration.

    Source: Halko, Martinsson and Tropp (2011), algorithm 4.4, https://arxiv.org/abs/0909.4061. The random test matrix
    has its own generator on the CPU: it is the same on every device, and no global random state changes.

    Args:
        multiply: the matrix times ``(cols, n)``.
        multiply_transposed: its transpose times ``(rows, n)``.
        shape: ``(rows, cols)`` of the matrix.
        rank: of the approximation.
        seed: of the test matrix.
        like: a tensor of the dtype and on the device to compute in.

    Returns:
        ``(rows, rank)`` and ``(rank, cols)``, whose product is the approximation; fewer ranks where the matrix has no
        more.
    """
    oversampled = min(2 * rank, *shape)
    generator = torch.Generator().manual_seed(seed)
    test = torch.randn(shape[1], oversampled, generator=generator).to(like)
    basis = torch.linalg.qr(multiply(test)).Q
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(multiply_transposed(basis)).Q
        basis = torch.linalg.qr(multiply(basis)).Q
    u, s, vh = torch.linalg.svd(multiply_transposed(basis).t(), full_matrices=False)
    return basis @ (u[:, :rank] * s[:rank]), vh[:rank]
