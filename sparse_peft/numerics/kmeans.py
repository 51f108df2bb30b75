"""One-dimensional k-means of many rows at once, with weights: exact by dynamic programming, or Lloyd's iteration.

On a line the clusters of a best solution are intervals, so that sorted values and running sums are all that is needed:
the mass, mean and squared error of any interval cost two look-ups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .panels import panels

# Bytes of the table of all intervals that the dynamic programme works on; larger ones leave the cache.
_COST_BYTES = 2**21
MAX_ITERATIONS = 100


class SortedRows:
    """Rows of weighted numbers, sorted, and the running sums of their weights, weighted values and squares.

    Args:
        values: ``(rows, n)`` float32.
        weights: ``(rows, n)`` at least 0, in a row not all 0.
    """

    def __init__(self, values: Tensor, weights: Tensor):
        self.values, order = values.sort(1)
        self.weights = weights.double().gather(1, order)
        self._exact = self.values.double()
        self._mass = _running(self.weights)
        self._first = _running(self.weights * self._exact)
        self._second = _running(self.weights * self._exact.square())
        self.rank = torch.zeros_like(order)
        self.rank[:, 1:] = (self.values[:, 1:] != self.values[:, :-1]).cumsum(1)

    def distinct(self, entries: int) -> tuple[Tensor, Tensor]:
        """``(rows, entries)`` tables of the distinct values, and ``(rows,)`` whether these are all of them.

        The largest value fills up a table that is not full.
        """
        tables = self.values[:, -1:].repeat(1, entries)
        all_of_them = self.rank[:, -1] < entries
        some = all_of_them.nonzero().squeeze(1)
        tables[some] = tables[some].scatter(1, self.rank[some], self.values[some])
        return tables, all_of_them

    def place(self, share: Tensor) -> Tensor:
        """``(rows, len(share))`` values at shares, from 0 to 1, of each row's mass."""
        wanted = share.double() * self._mass[:, -1:]
        last = self.values.shape[1] - 1
        return self.values.gather(1, (torch.searchsorted(self._mass[:, 1:].contiguous(), wanted)).clamp_(max=last))

    def companded(self) -> Tensor:
        """``(rows, n)`` from 0 to 1, along which entries of a good table lie evenly.

        Entries are densest where the values are: as the cube root of their density (Panter and Dite, 1951), which
        is one over the gap between neighbours.
        """
        gaps = self._exact.diff(dim=1)
        weights = (self.weights[:, 1:] + self.weights[:, :-1]) / 2
        way = _running((gaps.square() * weights).pow_(1 / 3))
        return way / way[:, -1:].clamp(min=torch.finfo(torch.float64).tiny)

    def means(self, edges: Tensor, otherwise: Tensor) -> Tensor:
        """``(rows, k)`` means of the intervals between ``(rows, k + 1)`` edges; of those without mass, others'."""
        mass = self._mass.gather(1, edges).diff(dim=1)
        found = self._first.gather(1, edges).diff(dim=1) / mass
        # rounding must not move the mean of equal values away from them
        last = self.values.shape[1] - 1
        low = self._exact.gather(1, edges[:, :-1].clamp(max=last))
        high = self._exact.gather(1, (edges[:, 1:] - 1).clamp(min=0))
        return torch.where(mass > 0, torch.minimum(torch.maximum(found, low), high), otherwise)

    def edges(self, centers: Tensor) -> Tensor:
        """``(rows, k + 1)`` where the values nearest to each of ``(rows, k)`` ascending centers begin and end."""
        middle = ((centers[:, 1:] + centers[:, :-1]) / 2).contiguous()
        inner = torch.searchsorted(self._exact, middle, right=True)
        return torch.nn.functional.pad(torch.nn.functional.pad(inner, (1, 0)), (0, 1), value=self.values.shape[1])

    def error(self, centers: Tensor) -> Tensor:
        """``(rows,)`` weighted squared distances to the nearest of ``(rows, k)`` ascending centers."""
        edges = self.edges(centers)
        mass, first, second = (sums.gather(1, edges).diff(dim=1) for sums in (self._mass, self._first, self._second))
        return (second - 2 * centers * first + centers.square() * mass).sum(1)

    def gains(self, edges: Tensor) -> Tensor:
        """``(rows, e, e)``: at ``[:, i, j]`` what an entry for all from edge ``j`` to ``i`` takes off the squares.

        An entry at the mean leaves the sum of squares less ``(sum of values)**2 / mass``. Intervals that end before
        they begin have ``-inf``.
        """
        mass, first = (sums.gather(1, edges) for sums in (self._mass, self._first))
        # what has no mass has no sum either
        mass = (mass[:, :, None] - mass[:, None, :]).add_(torch.finfo(torch.float64).tiny)
        gains = (first[:, :, None] - first[:, None, :]).square_().div_(mass)
        above = torch.ones(edges.shape[1], edges.shape[1], dtype=torch.bool, device=edges.device).triu_(1)
        return gains.masked_fill_(above, -torch.inf)

    def part(self, start: int, stop: int) -> SortedRows:
        """Some of the rows."""
        part = object.__new__(SortedRows)
        part.__dict__.update({name: tensor[start:stop] for name, tensor in self.__dict__.items()})
        return part


def _running(numbers: Tensor) -> Tensor:
    """Sums of all numbers before each, and of all."""
    return torch.nn.functional.pad(numbers.double().cumsum(1), (1, 0))


def lloyd(rows: SortedRows, centers: Tensor, iterations: int = MAX_ITERATIONS) -> Tensor:
    """Lloyd's iteration (1982): values go to the nearest center, centers to the mean of their values.

    The error never increases; a center without values stays where it is.

    Args:
        rows: the values.
        centers: ``(rows, k)`` float64, ascending.
        iterations: at most so many; fewer once nothing moves.

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
    """Tables ``(rows, entries)`` float64, ascending, that Lloyd's iteration may start from.

    ``"uniform"`` is a grid from the least to the largest value, ``"quantile"`` has equal mass around each entry, and
    ``"companded"`` lies between them: see ``SortedRows.companded``.
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

    A row with no more than ``bins`` distinct values has one bin for each, and its table is optimal. The bins of others
    are narrow where their values are dense, and the table is the best whose intervals do not cut a bin.

    Args:
        rows: the values.
        entries: of a table.
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
    # most[t][:, i]: the most that t + 1 entries gain for the bins before edge i
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
    # an interval without values takes the value that it ends before
    last = rows.values.shape[1] - 1
    return rows.means(ends, rows.values.gather(1, ends[:, 1:].clamp(max=last)).double())
