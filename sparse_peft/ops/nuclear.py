"""The nuclear norm of a sparse matrix and its gradient at the entries, by matrix products alone.

The gradient of the sum of singular values is the polar factor ``A (A^T A)^(-1/2)``, for A or its transpose, whichever
is tall. The inverse square root is computed by the Newton-Schulz iteration on the Gram matrix. Each step is scaled for
the interval of the singular values (Chen and Chow, "A stable scaling of Newton-Schulz", 2014), so that eleven steps
replace twenty plain ones. Only the Gram matrix, two more of its size and panels of A are alive together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..numerics.panels import panels
from ..support import Support

# Singular values below this share of the largest count only in part: float32 cannot resolve them in a Gram matrix.
LEAST_SHARE = 1e-3
CONVERGED = 1e-5


def _steps() -> list[tuple[float, float]]:
    """``(a, b)`` of each step ``X <- X (a + b X^T X)``, for singular values in ``[LEAST_SHARE, 1]``."""
    low, steps = LEAST_SHARE, []
    while 1 - low > CONVERGED:
        scale = math.sqrt(3 / (1 + low + low**2))
        steps.append((1.5 * scale, -0.5 * scale**3))
        low = low * (1.5 * scale - 0.5 * scale**3 * low**2)
    return steps


def _inverse_sqrt(gram: Tensor) -> Tensor:
    """``gram^(-1/2)`` on the range of ``gram``, ``(n, n)``; bounded on its null space."""
    scale = gram.diagonal().sum()
    gram = gram / scale
    # an upper bound of the largest eigenvalue: a share above 1 would make the iteration diverge
    square = gram @ gram
    bound = (square @ square).norm() ** 0.25 * (1 + 1e-4)
    gram = gram.div_(bound)
    first, *others = _steps()
    root = step = _polynomial(gram, *first)
    for coefficients in others:
        gram = step @ gram @ step
        step = _polynomial(gram, *coefficients)
        root = root @ step
    return root.div_((scale * bound).sqrt())


def _polynomial(gram: Tensor, a: float, b: float) -> Tensor:
    """``a + b * gram``."""
    step = gram * b
    step.diagonal().add_(a)
    return step


@torch.no_grad()
def nuclear_norm(entries: Tensor, support: Support) -> tuple[Tensor, Tensor]:
    """The nuclear norm of a sparse matrix, and its gradient at the entries.

    Args:
        entries: ``(entries,)`` float32 or float64.
        support: of the matrix.

    Returns:
        The norm, and its ``(entries,)`` gradient, which is 0 if all entries are 0. Singular values below a thousandth
        of the largest count in part.
    """
    if not bool(entries.any()):
        return entries.new_zeros(()), torch.zeros_like(entries)
    order, values = None, entries
    if support.shape[0] < support.shape[1]:
        support, order = support.transposed
        values = entries[order]
    rows, cols = support.shape
    bounds = panels(rows, cols * entries.dtype.itemsize)

    def each_panel() -> Iterator[tuple[Tensor, Tensor, int, int]]:
        for (start, stop), (first, last) in zip(bounds, support.entry_ranges(bounds), strict=True):
            at = support.part(start, stop, first, last).indices.long()
            panel = entries.new_zeros((stop - start) * cols).scatter_(0, at, values[first:last])
            yield panel.view(-1, cols), at, first, last

    with torch.autocast(entries.device.type, enabled=False):
        gram = entries.new_zeros(cols, cols)
        for panel, *_ in each_panel():
            gram.addmm_(panel.t(), panel)
        root = _inverse_sqrt(gram)
        gradient = torch.empty_like(values)
        for panel, at, first, last in each_panel():
            gradient[first:last] = (panel @ root).view(-1).index_select(0, at)
    if order is not None:
        gradient = torch.empty_like(gradient).scatter_(0, order, gradient)
    return torch.dot(gradient, entries), gradient
