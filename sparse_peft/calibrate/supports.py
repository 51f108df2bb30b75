"""Supports chosen from data: one pass over batches of an unwrapped model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from ..constraints import Limits, validated
from ..numerics.topk import topk_indices
from ..support.blocks import Block, best_blocks, divide_in_blocks, resolve_block_counts
from ..support.budget import Budget, Division, allocate, divide
from ..support.criteria import CRITERIA, Criterion, Statistics
from ..support.support import Support
from .activations import feature_norms
from .gradient_sums import CandidateBudget, GradientSums
from .layer_view import LayerView
from .model_pass import ModelPass

# Candidates for each trained entry; infinitely many keep them all.
Oversample = Annotated[float, Limits(least=1, finite=False)]

_SOURCES = {
    "none": "a seed and no data: use Support.random",
    "weight": "the weights and no data: use select",
    "gradient": "gradients, not activations",
    "activation": "activations, not gradients",
}


def _check_needs(criterion: Criterion, *needs: str) -> None:
    if criterion.needs not in needs:
        fitting = ", ".join(other.name for other in CRITERIA.values() if other.needs in needs)
        raise ValueError(f"selection={criterion.name!r} is computed from {_SOURCES[criterion.needs]}; use {fitting}")


@dataclass(frozen=True)
class _Choice:
    """How positions are chosen from scores, one layer's scores at a time.

    Attributes:
        shapes: ``{layer: (rows, cols)}`` of the stored weights.
        criterion: of the scores.
        budget: the number of positions, and how the layers share them.
        block: of the blocks that are chosen instead of single entries.
    """

    shapes: dict[str, tuple[int, int]]
    criterion: Criterion
    budget: Budget
    block: Block | None

    @torch.no_grad()
    def best(
        self, scores: Callable[[str], Tensor], candidates: Callable[[str], Tensor | None] = lambda name: None
    ) -> dict[str, Support]:
        """The best positions of every layer.

        Args:
            scores: ``scores(layer)`` of all entries, or of ``candidates(layer)`` where that is not None.
            candidates: ``candidates(layer)``: flat positions.
        """
        if self.block is not None:
            return self._best_blocks(scores, self.block)
        division, largest = divide(self.shapes, self.budget), self.criterion.largest
        counts = allocate(division, self.budget.allocation, scores, largest)
        supports = {}
        for name, shape in self.shapes.items():
            chosen = topk_indices(scores(name).reshape(-1), counts[name], largest, name=name)
            positions = candidates(name)
            chosen = chosen if positions is None else positions[chosen]
            supports[name] = Support(shape, chosen, validate=False, name=name)
        return supports

    def _best_blocks(self, scores: Callable[[str], Tensor], block: Block) -> dict[str, Support]:
        def matrix(name: str) -> Tensor:
            return scores(name).view(self.shapes[name])

        largest = self.criterion.largest
        counts = resolve_block_counts(self.shapes, self.budget, block, matrix, largest)
        per_block = block[0] * block[1]
        return {name: best_blocks(matrix(name), counts[name] // per_block, block, largest, name) for name in counts}


def _candidate_budget(division: Division, budget: Budget, oversample: float) -> CandidateBudget:
    """Layers share candidates where they share the budget by scores."""
    groups: dict[str, str | None] = {name: name for name in division.shapes}
    entries: dict[str | None, int] = {}
    if budget.allocation != "global":
        entries.update(allocate(division, budget.allocation))
    else:
        groups = {name: name if name in division.own else None for name in division.shapes}
        entries.update(division.own)
        entries[None] = division.total
    return CandidateBudget(groups, entries, oversample)


def collect_supports(
    data: ModelPass,
    layers: Iterable[LayerView],
    criterion: Criterion,
    budget: Budget,
    *,
    oversample: float = 8.0,
    block: Block | None = None,
) -> dict[str, Support]:
    """Choose each layer's positions from data, in one pass over the batches.

    Criteria that need gradients see each layer's weight gradient once, in panels of rows. The first batch that
    reaches a layer proposes ``oversample`` candidates for each trained entry, and all batches are summed at the
    candidates only. This is exact with one batch. With several, an entry that the first batch ranks below
    ``oversample`` times the budget cannot be chosen. ``oversample=float("inf")`` sums all entries and is always exact,
    for eight bytes per weight of all targets. With ``allocation="global"`` the candidates are the best of all layers
    together.

    The model is unchanged afterwards, also after an exception: no ``.grad`` is filled, and ``requires_grad`` and
    hooks are restored.

    Args:
        data: the model and its batches.
        layers: the target layers, in the model's order.
        criterion: one that needs gradients or activations.
        budget: the number of positions, and how the layers share them.
        oversample: candidates per trained entry, at least 1.
        block: choose blocks of this size instead of entries, by their sums of scores. All entries are summed, as with
            ``oversample=float("inf")``, since few candidates do not tell which block is best.

    Returns:
        ``{layer name: support}`` on the layers' devices.

    Warns:
        RuntimeWarning: a batch with a loss, gradients or inputs that are not finite is skipped.

    Raises:
        TypeError: batches that are no mappings, without ``loss_fn``.
        ValueError: a criterion that needs no data, no usable batch, a layer that the data never reached, or a budget
            that does not fit.

    Example:
        >>> import torch
        >>> from sparse_peft.calibrate import LayerView, ModelPass, collect_supports
        >>> from sparse_peft.support import Budget, get_criterion
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> data = ModelPass(model, [torch.randn(2, 8)], lambda model, batch: model(batch).square().mean())
        >>> layers = [LayerView.of("0", model[0])]
        >>> collect_supports(data, layers, get_criterion("gradient"), Budget(num_params=3))["0"].nnz
        3
    """
    _check_needs(criterion, "gradient", "activation")
    oversample = validated("oversample", oversample, Oversample)
    views = {layer.name: layer for layer in layers}
    choice = _Choice({name: layer.shape for name, layer in views.items()}, criterion, budget, block)
    division = divide(choice.shapes, budget)  # raises before the model runs
    if criterion.needs == "activation":
        return _from_activations(data, views, choice)
    if block is not None:
        divide_in_blocks(choice.shapes, budget, block)  # raises before the model runs
        oversample = math.inf
    return _from_gradients(data, views, choice, _candidate_budget(division, budget, oversample))


def _from_activations(data: ModelPass, views: Mapping[str, LayerView], choice: _Choice) -> dict[str, Support]:
    norms = feature_norms(data, {name: layer.module for name, layer in views.items()})

    def score(name: str) -> Tensor:
        layer = views[name]
        return choice.criterion.score(layer.weight(), Statistics(input_norms=norms[name]), in_dim=layer.in_dim)

    return choice.best(score)


def _from_gradients(
    data: ModelPass, views: Mapping[str, LayerView], choice: _Choice, candidates: CandidateBudget
) -> dict[str, Support]:
    criterion = choice.criterion
    collected = GradientSums(list(views.values()), criterion, candidates)
    collected.run(data)

    def score(name: str) -> Tensor:
        sums = collected.sums[name]
        weight = views[name].weight().reshape(-1) if criterion.uses_weight else None
        if weight is not None and sums.positions is not None:
            weight = weight.index_select(0, sums.positions)
        return criterion.score(weight, Statistics(gradient=sums.total, batches=sums.batches))

    return choice.best(score, lambda name: collected.sums[name].positions)


def given_gradients(shapes: Mapping[str, tuple[int, int]], gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The layers' weight gradients among those of other parameters.

    Args:
        shapes: ``{layer name: (rows, cols)}`` of the stored weights.
        gradients: ``{layer name or layer name + ".weight": gradient}``; other parameters' are ignored.

    Raises:
        ValueError: a layer without a gradient, or with one of another shape or not finite.
    """
    found = {}
    for name, shape in shapes.items():
        gradient = gradients.get(name, gradients.get(f"{name}.weight"))
        if gradient is None:
            raise ValueError(
                f"layer {name}: gradients has neither {name!r} nor '{name}.weight'; its names are "
                f"{', '.join(map(repr, list(gradients)[:3]))}{', ...' if len(gradients) > 3 else ''}"
            )
        if gradient.ndim == 3 and (gradient.shape[0] * gradient.shape[1], gradient.shape[2]) == shape:
            gradient = gradient.reshape(shape)  # of fused experts
        if tuple(gradient.shape) != shape:
            raise ValueError(
                f"layer {name}: a gradient of shape {tuple(gradient.shape)} for a weight stored as {shape}"
            )
        if not bool(gradient.isfinite().all()):
            raise ValueError(f"layer {name}: its gradient has NaN or infinite numbers; use that of another batch")
        found[name] = gradient.detach()
    return found


def supports_from_gradients(
    layers: Iterable[LayerView],
    criterion: Criterion,
    budget: Budget,
    gradients: Mapping[str, Tensor],
    *,
    block: Block | None = None,
) -> dict[str, Support]:
    """Choose each layer's positions from weight gradients that are known already.

    Args:
        layers: the target layers.
        criterion: one that needs gradients; each gradient counts as that of one batch.
        budget: the number of positions, and how the layers share them.
        gradients: ``{layer name or layer name + ".weight": gradient}``, of the shape of the stored weight; other
            parameters' are ignored.
        block: choose blocks of this size instead of entries, by their sums of scores.

    Returns:
        ``{layer name: support}`` on the gradients' devices.

    Raises:
        ValueError: another criterion, or a layer without a gradient, or with one of another shape or not finite.
    """
    _check_needs(criterion, "gradient")
    views = {layer.name: layer for layer in layers}
    shapes = {name: layer.shape for name, layer in views.items()}
    found = given_gradients(shapes, gradients)

    def score(name: str) -> Tensor:
        gradient = found[name].to(torch.float32)
        stats = Statistics(gradient=gradient.square() if criterion.squared_gradient else gradient)
        return criterion.score(views[name].weight() if criterion.uses_weight else None, stats)

    return _Choice(shapes, criterion, budget, block).best(score)
