"""Sums of the layers' weight gradients over data, at the entries that may turn out to be the best.

The first batch that reaches a layer proposes candidates, the best ``oversample`` times the budget; later batches are
summed at the candidates alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..numerics.topk import RunningTopK
from ..support.criteria import Criterion, Statistics
from ..support.support import index_dtype
from .gradient_hooks import NOT_FINITE, GradientPass, Place


@dataclass
class LayerSums:
    """One layer's running statistics.

    Attributes:
        shape: ``(rows, cols)`` of the stored weight.
        in_dim: which of the two is the input features'.
        weight: gives the stored weight in floats.
        positions: ``(candidates,)`` flat positions, ascending; None for all of them.
        total: ``(candidates,)`` float32 sum over batches; None before the first.
        batches: how many batches are in it.
    """

    shape: tuple[int, int]
    in_dim: int
    weight: Callable[[], Tensor]
    positions: Tensor | None = None
    total: Tensor | None = None
    batches: int = 0

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]


class Proposals:
    """The candidates of the layers that one batch reaches for the first time.

    Layers share a limit by being in one *group*: the best of all of them together stay.

    Args:
        groups: ``{layer: group}``.
        limits: ``{group: candidates}``.
        layers: the layers' sums.
        criterion: what scores them.
        panel_bytes: limit of a temporary's size.
    """

    def __init__(
        self,
        groups: dict[str, str | None],
        limits: dict[str | None, int],
        layers: dict[str, LayerSums],
        criterion: Criterion,
        panel_bytes: int,
    ):
        self.groups, self.limits, self.layers = groups, limits, layers
        self.criterion, self.panel_bytes = criterion, panel_bytes
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
        # a layer of a group may have none among the best; it keeps its own best then, since every layer trains one
        self.best_of: dict[str, RunningTopK] = {}
        self.complete: dict[str, Tensor] = {}

    def keeps_all(self, name: str) -> bool:
        group = self.groups[name]
        return self.limits[group] >= sum(self.layers[member].numel for member in self.members[group])

    def add(self, name: str, panels: Iterator[tuple[int, int, Tensor]]) -> str | None:
        """Take in one layer's gradient; says what is wrong with it if it is not finite."""
        layer, criterion = self.layers[name], self.criterion
        cols = layer.shape[1]
        if self.keeps_all(name):
            dense = None
            for start, stop, panel in panels:
                if not bool(panel.isfinite().all()):
                    return NOT_FINITE.format(name)
                if dense is None:
                    dense = torch.empty(layer.numel, dtype=torch.float32, device=panel.device)
                dense[start * cols : stop * cols] = _statistic(criterion, panel).reshape(-1)
            self.complete[name] = dense
            return None
        limit = self.limits[self.groups[name]]
        kept = self.kept.setdefault(self.groups[name], RunningTopK(limit, criterion.largest))
        best = self.best_of.setdefault(name, RunningTopK(1, criterion.largest))
        weight = layer.weight().detach() if criterion.uses_weight else None
        for start, stop, panel in panels:
            if not bool(panel.isfinite().all()):
                return NOT_FINITE.format(name)
            statistic = _statistic(criterion, panel)
            rows = None if weight is None else weight[start:stop]
            scores = criterion.score(rows, Statistics(gradient=statistic)).reshape(-1)
            values, key = statistic.reshape(-1), self.offsets[name] + start * cols
            kept.update_block(scores, key, values, name=name)
            best.update_block(scores, key, values, name=name)
        return None

    def results(self) -> Iterator[tuple[str, Tensor | None, Tensor]]:
        """``(layer, positions or None for all, values)`` of every layer that was added."""
        for name, dense in self.complete.items():
            yield name, None, dense
        for name, best in self.best_of.items():
            kept, layer, offset = self.kept[self.groups[name]], self.layers[name], self.offsets[name]
            keys, values = kept.result()[0], kept.payload()
            device = best.result()[0].device  # of the layer; the group may have its best of all elsewhere
            bounds = torch.tensor([offset, offset + layer.numel], device=keys.device)
            first, last = torch.searchsorted(keys, bounds).tolist()
            if first == last:
                keys, values = best.result()[0], best.payload()
                first, last = 0, 1
            positions = (keys[first:last] - offset).to(index_dtype(layer.shape))
            yield name, positions.to(device), values[first:last].clone().to(device)


def _statistic(criterion: Criterion, gradient: Tensor) -> Tensor:
    return gradient.square_() if criterion.squared_gradient else gradient


class GradientSums(GradientPass):
    """Collects ``LayerSums`` of the layers of an unwrapped model.

    Args:
        layers: ``{layer name: its sums}``, filled in by ``run``.
        criterion: one that needs gradients.
        groups: ``{layer: group}`` of layers that share a limit of candidates.
        budgets: ``{group: trained entries}``.
        oversample: candidates for each trained entry.
        panel_bytes: limit of a temporary's size.
    """

    def __init__(
        self,
        layers: dict[str, LayerSums],
        criterion: Criterion,
        groups: dict[str, str | None],
        budgets: dict[str | None, int],
        oversample: float,
        panel_bytes: int,
    ):
        super().__init__({name: Place(layer.shape, layer.in_dim) for name, layer in layers.items()}, panel_bytes)
        self.layers, self.criterion, self.groups, self.budgets = layers, criterion, groups, budgets
        self.oversample = oversample
        self._new: Proposals | None = None
        self._values: dict[str, Tensor] = {}

    def begin(self, is_last: bool) -> None:
        self._new, self._values = self._proposals(is_last), {}

    def was_reached(self, name: str) -> bool:
        return self.layers[name].total is not None

    def _proposals(self, is_last: bool) -> Proposals:
        # nothing is summed after the last batch, so it has no use for more candidates than entries
        oversample = 1.0 if is_last else self.oversample
        fresh = {name: group for name, group in self.groups.items() if self.layers[name].total is None}
        sizes: dict[str | None, int] = {}
        for name, group in fresh.items():
            sizes[group] = sizes.get(group, 0) + self.layers[name].numel
        limits = {}
        for group, size in sizes.items():
            wanted = oversample * self.budgets[group]
            limits[group] = size if wanted >= size else math.ceil(wanted)
        return Proposals(fresh, limits, self.layers, self.criterion, self.panel_bytes)

    def take(self, name: str, panels: Iterator[tuple[int, int, Tensor]]) -> str | None:
        if self.was_reached(name):
            return self._sum_at_candidates(name, panels)
        return self._new.add(name, panels)

    def _sum_at_candidates(self, name: str, panels: Iterator[tuple[int, int, Tensor]]) -> str | None:
        layer, cols = self.layers[name], self.layers[name].shape[1]
        values = torch.empty_like(layer.total)
        for start, stop, panel in panels:
            if not bool(panel.isfinite().all()):
                return NOT_FINITE.format(name)
            flat = _statistic(self.criterion, panel).reshape(-1)
            if layer.positions is None:
                values[start * cols : stop * cols] = flat
            else:
                bounds = layer.positions.new_tensor([start * cols, stop * cols])
                first, last = torch.searchsorted(layer.positions, bounds).tolist()
                values[first:last] = flat.index_select(0, layer.positions[first:last] - start * cols)
        self._values[name] = values
        return None

    def commit(self) -> None:
        for name, values in self._values.items():
            self.layers[name].total += values
            self.layers[name].batches += 1
        for name, positions, values in self._new.results():
            layer = self.layers[name]
            layer.positions, layer.total, layer.batches = positions, values, 1
        self._new, self._values = None, {}
