"""Sums of the layers' weight gradients over data, at candidate entries.

The first batch that reaches a layer proposes the candidates: the best ``oversample`` times the budget. Later batches
are summed at the candidates only.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..numerics.topk import RunningTopK
from ..support.criteria import Criterion, Statistics
from ..support.support import index_dtype
from .gradient_hooks import NOT_FINITE, GradientPass, Panel
from .layer_view import LayerView


@dataclass
class LayerSums:
    """Running sums of one layer.

    Attributes:
        positions: ``(candidates,)`` flat positions, ascending; None for all.
        total: ``(candidates,)`` float32 sum over batches.
    """

    positions: Tensor | None
    total: Tensor

    @property
    def all_positions(self) -> Tensor:
        """``(candidates,)`` int64 flat positions."""
        if self.positions is None:
            return torch.arange(self.total.numel(), device=self.total.device)
        return self.positions.long()

    def values_of(self, cols: int, panel: Panel) -> tuple[slice, Tensor]:
        """The candidates in a panel of rows, as a slice of ``total``, and the panel's values there."""
        start, stop, rows = panel
        flat = rows.reshape(-1)
        if self.positions is None:
            return slice(start * cols, stop * cols), flat
        bounds = self.positions.new_tensor([start * cols, stop * cols])
        first, last = torch.searchsorted(self.positions, bounds).tolist()
        return slice(first, last), flat.index_select(0, self.positions[first:last] - start * cols)


class Proposals:
    """The candidates of the layers that one batch reaches for the first time.

    Layers of one *group* share a limit: the best of all of them together remain.

    Args:
        groups: ``{layer: group}``.
        limits: ``{group: candidates}``.
        layers: ``{layer: view}``.
        criterion: scores the entries.
    """

    def __init__(
        self,
        groups: Mapping[str, str | None],
        limits: Mapping[str | None, int],
        layers: Mapping[str, LayerView],
        criterion: Criterion,
    ) -> None:
        self.groups, self.limits, self.layers, self.criterion = groups, limits, layers, criterion
        self.members: dict[str | None, list[str]] = {}
        for name, group in groups.items():
            self.members.setdefault(group, []).append(name)
        self.offsets: dict[str, int] = {}
        for names in self.members.values():
            offset = 0
            for name in names:
                self.offsets[name] = offset
                offset += layers[name].numel
        self.kept: dict[str | None, RunningTopK] = {}
        # every layer trains one entry: one without any among its group's best keeps its own best
        self.best_of: dict[str, RunningTopK] = {}
        self.complete: dict[str, Tensor] = {}

    def keeps_all(self, name: str) -> bool:
        """Whether the limit of the layer's group covers all entries of the group."""
        group = self.groups[name]
        return self.limits[group] >= sum(self.layers[member].numel for member in self.members[group])

    def add(self, name: str, panels: Iterator[Panel]) -> str | None:
        """Take in one layer's gradient; returns the fault of a gradient that is not finite."""
        take = self._keep_all if self.keeps_all(name) else self._rank
        return take(name, panels)

    def _keep_all(self, name: str, panels: Iterator[Panel]) -> str | None:
        layer = self.layers[name]
        dense: Tensor | None = None
        for start, stop, panel in panels:
            if not bool(panel.isfinite().all()):
                return NOT_FINITE.format(name)
            if dense is None:
                dense = torch.empty(layer.shape, dtype=torch.float32, device=panel.device)
            dense[start:stop] = _statistic(self.criterion, panel)
        if dense is not None:
            self.complete[name] = dense.reshape(-1)
        return None

    def _rank(self, name: str, panels: Iterator[Panel]) -> str | None:
        layer, criterion, group = self.layers[name], self.criterion, self.groups[name]
        kept = self.kept.setdefault(group, RunningTopK(self.limits[group], criterion.largest))
        best = self.best_of.setdefault(name, RunningTopK(1, criterion.largest))
        weight = layer.weight().detach() if criterion.uses_weight else None
        for start, stop, panel in panels:
            if not bool(panel.isfinite().all()):
                return NOT_FINITE.format(name)
            statistic = _statistic(criterion, panel)
            rows = None if weight is None else weight[start:stop]
            scores = criterion.score(rows, Statistics(gradient=statistic)).reshape(-1)
            values, key = statistic.reshape(-1), self.offsets[name] + start * layer.shape[1]
            kept.update_block(scores, key, values, name=name)
            best.update_block(scores, key, values, name=name)
        return None

    def results(self) -> Iterator[tuple[str, LayerSums]]:
        """The sums of every layer that was added, after its first batch."""
        for name, dense in self.complete.items():
            yield name, LayerSums(None, dense)
        for name, best in self.best_of.items():
            yield name, self._ranked(name, best)

    def _ranked(self, name: str, best: RunningTopK) -> LayerSums:
        kept, layer, offset = self.kept[self.groups[name]], self.layers[name], self.offsets[name]
        keys, values = kept.result()[0], kept.payload()
        device = best.result()[0].device  # of the layer; the group's best may lie on another
        bounds = torch.tensor([offset, offset + layer.numel], device=keys.device)
        first, last = torch.searchsorted(keys, bounds).tolist()
        if first == last:
            keys, values = best.result()[0], best.payload()
            first, last = 0, 1
        positions = (keys[first:last] - offset).to(index_dtype(layer.shape))
        return LayerSums(positions.to(device), values[first:last].clone().to(device))


def _statistic(criterion: Criterion, gradient: Tensor) -> Tensor:
    return gradient.square_() if criterion.squared_gradient else gradient


@dataclass(frozen=True)
class CandidateBudget:
    """How many entries layers train, and which layers share candidates.

    Attributes:
        groups: ``{layer: group}``.
        entries: ``{group: trained entries}``.
        oversample: candidates per trained entry.
    """

    groups: Mapping[str, str | None]
    entries: Mapping[str | None, int]
    oversample: float

    def limits(self, sizes: Mapping[str | None, int], is_last: bool) -> dict[str | None, int]:
        """``{group: candidates}`` for groups of some sizes; the last batch needs no more than the trained entries."""
        oversample = 1.0 if is_last else self.oversample
        wanted = {group: oversample * self.entries[group] for group in sizes}
        return {group: size if wanted[group] >= size else math.ceil(wanted[group]) for group, size in sizes.items()}


class GradientSums(GradientPass):
    """Collects the sums of layers over data.

    Args:
        layers: the layers.
        criterion: one that needs gradients.
        budget: of the candidates.

    Attributes:
        sums: ``{layer: sums}`` of the layers that a batch reached.
        batches: ``{layer: number of batches}`` in the sums; a batch that reached one of fused experts is one of all.
    """

    def __init__(self, layers: list[LayerView], criterion: Criterion, budget: CandidateBudget) -> None:
        super().__init__(layers)
        self.criterion, self.budget = criterion, budget
        self.sums: dict[str, LayerSums] = {}
        self.batches: Counter[str] = Counter()
        self._new = Proposals({}, {}, self.layers, criterion)
        self._values: dict[str, Tensor] = {}

    def begin(self, is_last: bool) -> None:
        self._new, self._values = self._proposals(is_last), {}

    def was_reached(self, name: str) -> bool:
        return name in self.sums

    def _proposals(self, is_last: bool) -> Proposals:
        fresh = {name: group for name, group in self.budget.groups.items() if name not in self.sums}
        sizes: dict[str | None, int] = {}
        for name, group in fresh.items():
            sizes[group] = sizes.get(group, 0) + self.layers[name].numel
        return Proposals(fresh, self.budget.limits(sizes, is_last), self.layers, self.criterion)

    def take(self, name: str, panels: Iterator[Panel]) -> str | None:
        if self.was_reached(name):
            return self._sum_at_candidates(name, panels)
        return self._new.add(name, panels)

    def _sum_at_candidates(self, name: str, panels: Iterator[Panel]) -> str | None:
        sums, cols = self.sums[name], self.layers[name].shape[1]
        values = torch.empty_like(sums.total)
        for start, stop, panel in panels:
            if not bool(panel.isfinite().all()):
                return NOT_FINITE.format(name)
            place, part = sums.values_of(cols, (start, stop, _statistic(self.criterion, panel)))
            values[place] = part
        self._values[name] = values
        return None

    def commit(self) -> None:
        for name, values in self._values.items():
            self.sums[name].total += values
        new = dict(self._new.results())
        self.batches.update({self.owners[name] for name in (*self._values, *new)})
        self.sums.update(new)
        self._new, self._values = Proposals({}, {}, self.layers, self.criterion), {}
