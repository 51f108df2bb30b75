"""Supports whose entries lie in few lines, the rows or the columns, of the weight.

A layer's values need the layer's inputs at the columns of their entries alone, so that a layer whose entries lie in
few of them keeps less for the backward pass.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..numerics.rng import sample_without_replacement
from ..numerics.topk import topk_indices
from .support import Support


def count_of_lines(shape: tuple[int, int], entries: int, dim: int, share: float) -> int:
    """How many lines of a dimension a share is, rounded up; at least as many as have room for the entries."""
    lines, others = shape[dim], shape[1 - dim]
    return min(lines, max(1, math.ceil(share * lines), math.ceil(entries / others)))


def random_in_lines(shape: tuple[int, int], entries: int, dim: int, share: float, *, seed: int, name: str) -> Support:
    """Random positions in random lines; they depend on the arguments alone.

    Args:
        shape: ``(rows, cols)`` of the stored weight.
        entries: number of positions.
        dim: 0 for rows, 1 for columns.
        share: of the lines that are chosen, in (0, 1].
        seed: any int.
        name: the layer's name.
    """
    count = count_of_lines(shape, entries, dim, share)
    chosen = sample_without_replacement(shape[dim], count, seed=seed, name=f"{name}: lines")
    drawn = sample_without_replacement(count * shape[1 - dim], entries, seed=seed, name=name)
    return _spread(drawn, chosen, shape, dim, name)


def best_in_lines(
    scores: Tensor, entries: int, dim: int, share: float, largest: bool = True, name: str = ""
) -> Support:
    """The lines with the best sums of scores, and in these the entries with the best scores.

    Args:
        scores: ``(rows, cols)``.
        entries: number of positions.
        dim: 0 for rows, 1 for columns.
        share: of the lines that are chosen, in (0, 1].
        largest: whether large scores are good ones.
        name: the layer's name.

    Raises:
        ValueError: scores that are NaN.
    """
    shape = scores.shape[0], scores.shape[1]
    count = count_of_lines(shape, entries, dim, share)
    chosen = topk_indices(scores.sum(1 - dim), count, largest, name=name)
    among = scores.index_select(dim, chosen)
    return _spread(topk_indices(among.reshape(-1), entries, largest, name=name), chosen, shape, dim, name)


def _spread(inner: Tensor, lines: Tensor, shape: tuple[int, int], dim: int, name: str) -> Support:
    """Flat positions among some lines, ascending, as positions of the weight."""
    width = lines.numel() if dim == 1 else shape[1]
    row, col = torch.div(inner, width, rounding_mode="floor"), inner % width
    row, col = (lines[row], col) if dim == 0 else (row, lines[col])
    return Support(shape, row * shape[1] + col, validate=False, name=name)


def within_lines(support: Support, dim: int) -> tuple[Tensor, Support]:
    """The lines that have entries, and the support within these lines alone; found once.

    Args:
        support: of a weight.
        dim: 0 for rows, 1 for columns.

    Returns:
        ``(lines,)`` int64, ascending, and the support of the weight without other lines, its entries in the same
        order.

    Example:
        >>> import torch
        >>> from sparse_peft.support import Support
        >>> from sparse_peft.support.lines import within_lines
        >>> lines, inner = within_lines(Support((2, 8), torch.tensor([3, 6, 11])), dim=1)
        >>> lines.tolist(), inner.shape, inner.indices.tolist()
        ([3, 6], (2, 2), [0, 1, 2])
    """
    key = f"within lines of dimension {dim}"
    if key not in support.derived:
        place = (support.cols if dim == 1 else support.rows).long()
        used = torch.zeros(support.shape[dim], dtype=torch.bool, device=support.device)
        used[place] = True
        lines = used.nonzero().squeeze(1)
        number = torch.searchsorted(lines, place)
        if dim == 1:
            shape, flat = (support.shape[0], lines.numel()), support.rows.long() * lines.numel() + number
        else:
            shape, flat = (lines.numel(), support.shape[1]), number * support.shape[1] + support.cols.long()
        support.derived[key] = lines, Support(shape, flat, validate=False, name=support.name).compact()
    return support.derived[key]
