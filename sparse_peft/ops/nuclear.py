"""The nuclear norm of a sparse matrix and its gradient there, by matrix products alone.

The gradient of the sum of singular values is the polar factor ``A (A^T A)^(-1/2)``, here of the tall one of A and its
transpose. The inverse square root comes from the Newton-Schulz iteration on the Gram matrix, each step scaled for the
interval that the singular values are known to be in (Chen and Chow, "A stable scaling of Newton-Schulz", 2014), so
that eleven steps do what plain ones need twenty for. Only the Gram matrix and two more of its size are alive, and
panels of A: nothing of A's own size is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..numerics.panels import panels
from ..support import Support

# Singular values below this share of the largest count only in part; float32 knows no better from a Gram matrix.
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
    """``gram^(-1/2)`` on the space where it is not zero, ``(n, n)``; what it makes of the rest stays bounded."""
    scale = gram.diagonal().sum()
    gram = gram / scale
    # a bound on the largest eigenvalue that is never too low: a share above 1 would turn the iteration's sign
    square = gram @ gram
    bound = (square @ square).norm() ** 0.25 * (1 + 1e-4)
    gram = gram.div_(bound)
    root, steps = None, _steps()
    for number, (a, b) in enumerate(steps, 1):
        step = gram * b
        step.diagonal().add_(a)
        root = step if root is None else root @ step
        if number < len(steps):
            gram = step @ gram @ step
    return root.div_((scale * bound).sqrt())


@torch.no_grad()
def nuclear_norm(entries: Tensor, support: Support) -> tuple[Tensor, Tensor]:
    """The nuclear norm of a sparse matrix, and its gradient at the entries.

    Args:
        entries: ``(entries,)`` float32 or float64.
        support: where they are.

    Returns:
        The norm, and ``(entries,)`` its gradient, 0 where all entries are 0. Directions with singular values below a
        thousandth of the largest count in part.
    """
    if not bool(entries.any()):
        return entries.new_zeros(()), torch.zeros_like(entries)
    order = None
    if support.shape[0] < support.shape[1]:
        support, order = support.transposed
        values = entries[order]
    else:
        values = entries
    rows, cols = support.shape
    bounds = panels(rows, cols * entries.dtype.itemsize)

    def each_panel():
        for (start, stop), (first, last) in zip(bounds, support.entry_ranges(bounds), strict=True):
            at = support.indices[first:last].long() - start * cols
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
