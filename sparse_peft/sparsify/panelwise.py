"""The best set of weights, found from scores that are computed one panel of rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..numerics.bits import pack_bits
from ..numerics.order_statistics import order_statistics
from ..numerics.panels import panels
from ..numerics.topk import check_scores
from .patterns import NM, Shape, Unstructured

Scores = Callable[[int, int], Tensor]
"""``scores(start, stop)``: ``(stop - start, inputs)`` scores of these rows, the same each time."""


def keep_in_panels(
    pattern: NM | Unstructured, scores: Scores, shape: Shape, units: int | None = None, *, name: str = ""
) -> Tensor:
    """As ``Pattern.keep``, packed into bits and without a tensor of all scores.

    A pattern of the whole matrix takes six passes over the scores, unless they fit into one panel; others take one.

    Args:
        pattern: n:m, or unstructured within rows or the matrix.
        scores: of the weight's rows.
        shape: ``(outputs, inputs)``.
        units: number of weights that stay; by default the pattern's share, rounded.
        name: the layer's name, for error messages.

    Returns:
        ``(outputs, ceil(inputs / 8))`` uint8; see ``pack_bits``.

    Raises:
        ValueError: scores that are NaN, a shape that the pattern does not fit, or the scope ``"column"``.
    """
    rows, cols = shape
    pattern.check(shape, name)
    scope = getattr(pattern, "scope", "row")
    if scope == "column":
        raise ValueError("scope='column': columns are not compared panel by panel; use 'row' or 'matrix'")
    units = round(pattern.density * rows * cols) if units is None else units
    # a panel's scores are ordered: their order is int64
    bounds = panels(rows, cols * 2 * torch.int64.itemsize)
    if scope == "row":
        each, more = divmod(units, rows)
        masks: Iterator[Tensor] = (
            pattern.keep(scores(start, stop), each * (stop - start) + max(0, min(stop, more) - start), name=name)
            for start, stop in bounds
        )
    elif len(bounds) == 1:
        masks = iter([pattern.keep(scores(0, rows), units, name=name)])
    else:
        masks = _above_threshold(scores, bounds, rows * cols, units, name)
    return torch.cat([pack_bits(mask) for mask in masks])


def _above_threshold(
    scores: Scores, bounds: list[tuple[int, int]], numel: int, units: int, name: str
) -> Iterator[Tensor]:
    """The masks of the panels: the ``units`` best scores of all, ties to the lowest positions."""
    lowest = []
    for start, stop in bounds:
        panel = scores(start, stop)
        check_scores(panel.reshape(-1), name)
        lowest.append(float(panel.amin()))
    least = min(lowest)

    def chunks() -> Iterator[Tensor]:
        for start, stop in bounds:
            yield scores(start, stop).double() - least

    if not 0 < units < numel:
        yield from (torch.full_like(chunk, units > 0, dtype=torch.bool) for chunk in chunks())
        return
    (last,) = order_statistics(chunks, [numel - units + 1])
    ties = units - sum(int((chunk > last).sum()) for chunk in chunks())
    for chunk in chunks():
        equal = chunk == last
        # among equal ones the first `ties`
        before = equal.flatten().cumsum(0).view_as(equal)
        yield (chunk > last) | (equal & (before <= ties))
        ties -= int(before.flatten()[-1])
