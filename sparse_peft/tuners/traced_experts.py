"""Products with experts' weights in compiled graphs.

The graph is traced through the base's own module. Its products become ops that set the entries in copies of panels, so
that a graph writes to no weight.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import get_overridable_functions

from ..ops import (
    OneExpert,
    Recipe,
    Routing,
    SeveralExperts,
    SortedTokens,
    effective_entries,
    functional_experts,
    read_support,
)
from .active_delta import ActiveDelta
from .backups import EntriesBackup
from .delta_layer import SparseTunerLayer
from .expert_mode import NOTHING, ExpertsMode, View, WeightPass


def show_grouped_products() -> None:
    """Let modes see torch's grouped product in graphs, as they do outside of them.

    Its name begins with an underscore, so that torch leaves it out of the functions that it looks for modes for.
    """
    function = getattr(torch, "_grouped_mm", None)
    known = get_overridable_functions()[torch]
    if function is None or function in known:
        return
    known.append(function)
    tracer = sys.modules.get("torch._dynamo.variables.torch")
    if tracer is not None:  # it has a copy by now
        tracer.get_overridable_functions().add(function)


@dataclass(frozen=True)
class _TracedSource:
    """The experts of a parameter, which does not hold the entries as far as a graph knows."""

    experts: int
    is_whole = False


class TracedPass(WeightPass):
    """One expert parameter in one traced pass of its module.

    Args:
        layer: of the parameter.
        delta: the adapters that act.
    """

    def __init__(self, layer: SparseTunerLayer[Any], delta: ActiveDelta):
        weight, backup = layer.base_parameter, layer.ledger.backup
        source: Any = _TracedSource(len(weight))  # whose weights a graph does not ask for
        super().__init__(weight, source, layer.sum_values(delta), delta.support, layer.name)
        if isinstance(backup, EntriesBackup):
            self.originals = backup.originals
        else:
            self.originals = read_support(weight.detach(), delta.support)
        self.key = layer.observer_key


class TracedMode(ExpertsMode):
    """Takes over the products of one traced pass with expert parameters.

    Args:
        passes: of the parameters.
    """

    def __init__(self, passes: Sequence[WeightPass]):
        super().__init__([])
        self._seen = [View(one, one.parameter) for one in passes]

    # a graph's tensors have no ids, but an identity

    def _find(self, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[int, View | None]:
        for place, argument in enumerate(args):
            view = self._view_of(argument)
            if view is not None:
                return place, view
            for part in argument if isinstance(argument, (list, tuple)) else ():
                view = self._view_of(part)
                if view is not None:
                    return -1, view
        for argument in kwargs.values():
            view = self._view_of(argument)
            if view is not None:
                return -1, view
        return NOTHING

    def _view_of(self, argument: Any) -> View | None:
        if isinstance(argument, Tensor):
            for view in self._seen:
                if argument is view.tensor:
                    return view
        return None

    def _keep(self, view: View) -> Tensor:
        self._seen.append(view)
        return view.tensor

    def _remember(self, func: Any, args: Any, result: Any) -> None:
        """What is computed again is the compiler's choice."""

    def _recipe(self, x: Tensor) -> Recipe | None:
        return None

    def _recipe_without_products(self, x: Tensor) -> Recipe | None:
        return None

    def _product(self, view: View, x: Tensor, routing: Routing, in_dim: int, *how: Any) -> Tensor:
        one = view.of
        assert isinstance(one, TracedPass) and one.values is not None and one.support is not None
        if isinstance(routing, OneExpert):
            experts = torch.arange(one.source.experts, device=x.device)
            routing = SortedTokens((experts >= routing.expert) * routing.tokens)
        assert isinstance(routing, SeveralExperts)
        return functional_experts(x, one.values, one.parameter, one.originals, one.support, routing, in_dim, one.key)

    def _dense(self, view: View, func: Any) -> Tensor:
        """All of the effective weights in ordinary operations, for functions that are no products."""
        one = view.of
        assert isinstance(one, TracedPass) and one.values is not None and one.support is not None
        entries = effective_entries(one.originals, one.values)
        flat = one.parameter.reshape(-1).scatter(0, one.support.indices.long(), entries)
        weight = flat.view(one.parameter.shape)
        if view.expert is not None:
            weight = weight[view.expert]
        elif view.ids is not None:
            weight = weight[view.ids]
        return weight.transpose(-2, -1) if view.is_turned else weight
