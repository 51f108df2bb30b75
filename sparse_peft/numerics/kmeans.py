"""Weighted one-dimensional k-means of many rows: exact by dynamic programming, or by Lloyd's iteration.

On a line, the clusters of an optimal solution are intervals. With sorted values and running sums, the mass, mean and
squared error of an interval cost two look-ups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .panels import panels

# Size of the table of all intervals in the dynamic programme; larger tables do not fit the cache.
_COST_BYTES = 2**21
MAX_ITERATIONS = 100


class SortedRows:
    """Rows of weighted numbers, sorted, with running sums of their weights, weighted values and squares.

    Args:
        values: ``(rows, n)`` float32.
        weights: ``(rows, n)`` of at least 0, not all 0 in any row.
    """

    def __init__(self, values: Tensor, weights: Tensor) -> None:
        self.values, order = values.sort(1)
        self.weights = weights.double().gather(1, order)
        self._exact = self.values.double()
        self._mass = _running(self.weights)
        self._first = _running(self.weights * self._exact)
        self._second = _running(self.weights * self._exact.square())
        self.rank = torch.zeros_like(order)
        self.rank[:, 1:] = (self.values[:, 1:] != self.values[:, :-1]).cumsum(1)

    def distinct(self, entries: int) -> tuple[Tensor, Tensor]:
        """``(rows, entries)`` tables of the distinct values, and ``(rows,)`` whether a table holds all of them.

        The largest value fills the rest of a table.
        """
        tables = self.values[:, -1:].repeat(1, entries)
        all_of_them = self.rank[:, -1] < entries
        some = all_of_them.nonzero().squeeze(1)
        tables[some] = tables[some].scatter(1, self.rank[some], self.values[some])
        return tables, all_of_them

    def place(self, share: Tensor) -> Tensor:
        """``(rows, len(share))`` quantiles: the values at shares, from 0 to 1, of each row's mass."""
        wanted = share.double() * self._mass[:, -1:]
        last = self.values.shape[1] - 1
        return self.values.gather(1, (torch.searchsorted(self._mass[:, 1:].contiguous(), wanted)).clamp_(max=last))

    def companded(self) -> Tensor:
        """``(rows, n)`` from 0 to 1: a scale on which the entries of a good table are evenly spaced.

        The density of the entries is the cube root of the values' density (Panter and Dite, 1951), which is one over
        the gap between neighbours.
        """
        gaps = self._exact.diff(dim=1)
        weights = (self.weights[:, 1:] + self.weights[:, :-1]) / 2
        way = _running((gaps.square() * weights).pow_(1 / 3))
        return way / way[:, -1:].clamp(min=torch.finfo(torch.float64).tiny)

    def means(self, edges: Tensor, otherwise: Tensor) -> Tensor:
        """``(rows, k)`` means of the intervals between ``(rows, k + 1)`` edges; ``otherwise`` where the mass is 0."""
        mass = self._mass.gather(1, edges).diff(dim=1)
        found = self._first.gather(1, edges).diff(dim=1) / mass
        # rounding must not move the mean of equal values away from them
        last = self.values.shape[1] - 1
        low = self._exact.gather(1, edges[:, :-1].clamp(max=last))
        high = self._exact.gather(1, (edges[:, 1:] - 1).clamp(min=0))
        return torch.where(mass > 0, torch.minimum(torch.maximum(found, low), high), otherwise)

    def edges(self, centers: Tensor) -> Tensor:
        """``(rows, k + 1)`` bounds of the values nearest to each of ``(rows, k)`` ascending centers."""
        middle = ((centers[:, 1:] + centers[:, :-1]) / 2).contiguous()
        inner = torch.searchsorted(self._exact, middle, right=True)
        return torch.nn.functional.pad(torch.nn.functional.pad(inner, (1, 0)), (0, 1), value=self.values.shape[1])

    def error(self, centers: Tensor) -> Tensor:
        """``(rows,)`` sums of weighted squared distances to the nearest of ``(rows, k)`` ascending centers."""
        edges = self.edges(centers)
        mass, first, second = (sums.gather(1, edges).diff(dim=1) for sums in (self._mass, self._first, self._second))
        return (second - 2 * centers * first + centers.square() * mass).sum(1)

    def gains(self, edges: Tensor) -> Tensor:
        """``(rows, e, e)``: at ``[:, i, j]`` the reduction of the squared error by one entry for edges ``j`` to ``i``.

        An entry at the mean reduces the sum of squares by ``(sum of values)**2 / mass``. Intervals that end before
        they begin have ``-inf``.
        """
        mass, first = (sums.gather(1, edges) for sums in (self._mass, self._first))
        # an interval without mass has a sum of 0
        mass = (mass[:, :, None] - mass[:, None, :]).add_(torch.finfo(torch.float64).tiny)
        gains = (first[:, :, None] - first[:, None, :]).square_().div_(mass)
        above = torch.ones(edges.shape[1], edges.shape[1], dtype=torch.bool, device=edges.device).triu_(1)
        return gains.masked_fill_(above, -torch.inf)

    def part(self, start: int, stop: int) -> SortedRows:
        """Rows ``start`` to ``stop``."""
        part = object.__new__(SortedRows)
        part.__dict__.update({name: tensor[start:stop] for name, tensor in self.__dict__.items()})
        return part


def _running(numbers: Tensor) -> Tensor:
    """``(rows, n + 1)`` running sums, starting with 0."""
    return torch.nn.functional.pad(numbers.double().cumsum(1), (1, 0))


def lloyd(rows: SortedRows, centers: Tensor, iterations: int = MAX_ITERATIONS) -> Tensor:
    """Lloyd's iteration (1982): values move to the nearest center, centers to the mean of their values.

    The error never increases. A center without values does not move.

    Args:
        rows: the values.
        centers: ``(rows, k)`` float64, ascending.
        iterations: maximum number; the iteration stops once nothing moves.

    Returns:
        ``(rows, k)`` float64, ascending.
    """
    edges = None
    for _ in range(iterations):
        previous, edges = edges, rows.edges(centers)
        if previous is not None and torch.equal(previous, edges):
            break
        centers = rows.means(edges, centers)
    return centers


def starts(rows: SortedRows, entries: int) -> dict[str, Tensor]:
    """Starting tables ``(rows, entries)`` float64, ascending, for Lloyd's iteration.

    ``"uniform"`` is a grid from the smallest to the largest value, ``"quantile"`` has equal mass around each entry,
    and ``"companded"`` lies between them: see ``SortedRows.companded``.
    """
    low, high = rows.values[:, :1].double(), rows.values[:, -1:].double()
    share = torch.arange(entries, dtype=torch.float64, device=low.device)
    inner = (share + 0.5) / entries
    way = rows.companded()
    places = torch.searchsorted(way, inner.expand(way.shape[0], -1).contiguous()).clamp_(max=way.shape[1] - 1)
    return {
        "uniform": torch.lerp(low, high, share / max(1, entries - 1)),
        "quantile": rows.place(inner).double(),
        "companded": rows.values.gather(1, places).double(),
    }


def optimal(rows: SortedRows, entries: int, bins: int) -> Tensor:
    """The best tables by dynamic programming (Wang and Song, 2011), over bins of neighbouring values.

    A row with at most ``bins`` distinct values has one bin for each, and its table is optimal. In other rows, bins are
    narrow where values are dense, and the table is optimal among those whose intervals do not split a bin.

    Args:
        rows: the values.
        entries: per table.
        bins: at least ``entries``; time grows with their square.

    Returns:
        ``(rows, entries)`` float64, ascending.
    """
    bytes_per_row = (bins + 1) ** 2 * torch.float64.itemsize
    bounds = panels(rows.values.shape[0], bytes_per_row, max(1, _COST_BYTES // bytes_per_row))
    return torch.cat([_optimal(rows.part(start, stop), entries, bins) for start, stop in bounds])


def _optimal(rows: SortedRows, entries: int, bins: int) -> Tensor:
    few = rows.rank[:, -1:] < bins
    bin_of = torch.where(few, rows.rank, (rows.companded() * bins).long().clamp_(max=bins - 1)).contiguous()
    numbers = torch.arange(bins + 1, device=bin_of.device).expand(bin_of.shape[0], -1).contiguous()
    edges = torch.searchsorted(bin_of, numbers)
    gains = rows.gains(edges)
    # most[t][:, i]: the largest gain of t + 1 entries for the bins before edge i
    most = [gains[:, :, 0].contiguous()]
    for _ in range(entries - 2):
        most.append((most[-1][:, None, :] + gains).amax(2))
    cut = torch.full_like(edges[:, :1], bins)
    cuts = [cut]
    for before in reversed(most[: entries - 1]):
        ending = gains.gather(1, cut[:, :, None].expand(-1, -1, bins + 1)).squeeze(1)
        cut = (before + ending).argmax(1, keepdim=True)
        cuts.append(cut)
    cuts.append(torch.zeros_like(cut))
    ends = edges.gather(1, torch.cat(cuts[::-1], 1))
    # an interval without values takes the next value
    last = rows.values.shape[1] - 1
    return rows.means(ends, rows.values.gather(1, ends[:, 1:].clamp(max=last)).double())
