"""Supports chosen from data: one pass over batches of an unwrapped model."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from ..constraints import Limits, validated
from ..numerics.topk import topk_indices
from ..support.blocks import Block, best_blocks, divide_in_blocks, random_blocks, resolve_block_counts
from ..support.budget import Budget, allocate, divide
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


class _Scores(NamedTuple):
    """Scores of a layer's entries.

    Attributes:
        scores: ``(n,)``.
        positions: ``(n,)`` flat positions, ascending; None for all.
    """

    scores: Tensor
    positions: Tensor | None = None


@dataclass(frozen=True)
class _Choice:
    """How positions are chosen from scores, one layer's scores at a time.

    Of fused experts, those that no token reached train entries at random positions: their equal share.

    Attributes:
        views: ``{name: layer}``.
        criterion: of the scores.
        budget: the number of positions, and how the layers share them.
        block: of the blocks that are chosen instead of single entries.
        seed: of random positions.
    """

    views: Mapping[str, LayerView]
    criterion: Criterion
    budget: Budget
    block: Block | None
    seed: int

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """``{layer: (rows, cols)}`` of the stored weights."""
        return {name: layer.shape for name, layer in self.views.items()}

    @torch.no_grad()
    def best(self, scores: Callable[[str], _Scores], idle: Mapping[str, list[int]]) -> dict[str, Support]:
        """The best positions of every layer.

        Args:
            scores: ``scores(layer)`` of all entries or of some.
            idle: ``{layer: its experts}`` that no token reached; their scores do not count.
        """
        _warn_idle(idle)

        def counted(name: str) -> _Scores:
            return self._without(scores(name), name, idle.get(name, []))

        if self.block is not None:
            return self._best_blocks(counted, idle, self.block)
        division, largest = divide(self.shapes, self.budget), self.criterion.largest
        counts = allocate(division, self.budget.allocation, lambda name: counted(name).scores, largest)
        supports = {}
        for name, shape in self.shapes.items():
            drawn = self._drawn(name, counts[name], idle.get(name, []))
            flat, positions = counted(name)
            chosen = topk_indices(flat, counts[name] - sum(map(len, drawn)), largest, name=name)
            chosen = chosen if positions is None else positions[chosen]
            supports[name] = self._support(name, shape, chosen, drawn)
        return supports

    @staticmethod
    def _support(name: str, shape: tuple[int, int], chosen: Tensor, drawn: list[Tensor]) -> Support:
        if drawn:
            parts = [chosen.long(), *(part.to(chosen.device, torch.int64) for part in drawn)]
            chosen = torch.cat(parts).sort().values
        return Support(shape, chosen, validate=False, name=name)

    def _without(self, found: _Scores, name: str, idle: list[int]) -> _Scores:
        """The scores, which are the worst for idle experts; scores of some entries have none of these."""
        flat = found.scores.reshape(-1)
        if idle and found.positions is None:
            flat = flat.clone()
            flat.view(self.views[name].experts, -1)[idle] = -math.inf if self.criterion.largest else math.inf
        return _Scores(flat, found.positions)

    def _drawn(self, name: str, count: int, idle: list[int]) -> list[Tensor]:
        """Random positions of each idle expert, of ``count`` entries of the layer."""
        if not idle:
            return []
        parts, block = self.views[name].parts, self.block or (1, 1)
        (rows, cols), size = parts[0].shape, block[0] * block[1]
        grid = (rows // block[0]) * (cols // block[1])
        shares = _shares(count // size, len(parts), len(idle), grid)
        drawn = []
        for number, share in zip(idle, shares, strict=True):
            one = random_blocks((rows, cols), block, share, seed=self.seed, name=parts[number].name)
            drawn.append(one.indices.long() + number * rows * cols)
        return drawn

    def _best_blocks(
        self, scores: Callable[[str], _Scores], idle: Mapping[str, list[int]], block: Block
    ) -> dict[str, Support]:
        def matrix(name: str) -> Tensor:
            return scores(name).scores.view(self.shapes[name])

        largest, per_block = self.criterion.largest, block[0] * block[1]
        counts = resolve_block_counts(self.shapes, self.budget, block, matrix, largest)
        supports = {}
        for name, count in counts.items():
            drawn = self._drawn(name, count, idle.get(name, []))
            blocks = (count - sum(map(len, drawn))) // per_block
            chosen = best_blocks(matrix(name), blocks, block, largest, name)
            supports[name] = self._support(name, self.shapes[name], chosen.indices, drawn) if drawn else chosen
        return supports

    def check_blocks(self) -> None:
        """Refuse blocks that lie in two experts.

        Raises:
            ValueError: names the layer.
        """
        for name, layer in self.views.items():
            rows = layer.shape[0] // layer.experts
            if self.block is not None and layer.experts > 1 and rows % self.block[0]:
                raise ValueError(
                    f"layer {name}: blocks of {self.block[0]} rows (block_size) would lie in two experts, which have "
                    f"{rows} rows each; choose a number that divides {rows}"
                )


def _shares(count: int, experts: int, idle: int, most: int) -> list[int]:
    """Entries of each idle expert: an equal share, and more where the others have no more than ``most``."""
    share = count // experts
    rest = max(0, count - share * idle - (experts - idle) * most)
    return [share + (number < rest) for number in range(idle)]


def _warn_idle(idle: Mapping[str, list[int]]) -> None:
    found = {name: numbers for name, numbers in idle.items() if numbers}
    if found:
        name, numbers = next(iter(found.items()))
        others = sum(map(len, found.values())) - len(numbers)
        shown = ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
        warnings.warn(
            f"layer {name}: no token of the data reached the experts {shown}, and {others} others in other layers; "
            "each trains an equal share of its layer's entries at random positions. More data chooses them",
            RuntimeWarning,
            stacklevel=6,
        )


def _candidate_budget(choice: _Choice, oversample: float) -> CandidateBudget:
    """Layers share candidates where they share the budget by scores; experts of one layer do always."""
    division, budget = divide(choice.shapes, choice.budget), choice.budget
    shared = {name for name in choice.views if budget.allocation == "global" and name not in division.own}
    entries: dict[str | None, int] = {}
    if shared:
        entries.update(division.own)
        entries[None] = division.total
    else:
        entries.update(allocate(division, "numel" if budget.allocation == "global" else budget.allocation))
    groups = {
        part.name: None if name in shared else name for name, layer in choice.views.items() for part in layer.parts
    }
    return CandidateBudget(groups, entries, oversample)


def collect_supports(
    data: ModelPass,
    layers: Iterable[LayerView],
    criterion: Criterion,
    budget: Budget,
    *,
    oversample: float = 8.0,
    block: Block | None = None,
    seed: int = 0,
) -> dict[str, Support]:
    """Choose each layer's positions from data, in one pass over the batches.

    Criteria that need gradients see each layer's weight gradient once, in panels of rows. The first batch that
    reaches a layer proposes ``oversample`` candidates for each trained entry, and all batches are summed at the
    candidates only. This is exact with one batch. With several, an entry that the first batch ranks below
    ``oversample`` times the budget cannot be chosen. ``oversample=float("inf")`` sums all entries and is always exact,
    for eight bytes per weight of all targets. With ``allocation="global"`` the candidates are the best of all layers
    together.

    The gradient and the inputs of each of fused experts are those of the tokens routed to it, one expert at a time.
    Experts that no token reached train an equal share of their layer's entries at random positions.

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
        seed: of random positions.

    Returns:
        ``{layer name: support}`` on the layers' devices.

    Warns:
        RuntimeWarning: a batch with a loss, gradients or inputs that are not finite is skipped; experts that no token
            reached.

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
    choice = _Choice({layer.name: layer for layer in layers}, criterion, budget, block, seed)
    choice.check_blocks()
    divide(choice.shapes, budget)  # raises before the model runs
    if criterion.needs == "activation":
        return _from_activations(data, choice)
    if block is not None:
        divide_in_blocks(choice.shapes, budget, block)  # raises before the model runs
        oversample = math.inf
    return _from_gradients(data, choice, _candidate_budget(choice, oversample))


def _from_activations(data: ModelPass, choice: _Choice) -> dict[str, Support]:
    for layer in choice.views.values():
        if layer.tied:
            raise ValueError(
                f"selection={choice.criterion.name!r} scores a weight by the norms of its inputs, and that of layer "
                f"{layer.name} has several: it is tied to {', '.join(view.name for view in layer.tied)}. Choose a "
                "selection by gradients or by the weight, or leave the layers out with exclude_modules"
            )
    norms = feature_norms(data, list(choice.views.values()))

    def score(part: LayerView) -> Tensor:
        found = Statistics(input_norms=norms[part.name])
        return choice.criterion.score(part.weight(), found, in_dim=part.in_dim)

    def scores(name: str) -> _Scores:
        parts, numbers = choice.views[name].parts, idle[name]
        if len(parts) == 1:
            return _Scores(score(parts[0]))
        found = torch.zeros(len(parts), *parts[0].shape, device=parts[0].weight().device)
        for number, part in enumerate(parts):
            if number not in numbers:
                found[number] = score(part)
        return _Scores(found)

    idle = {name: _idle(layer, norms) for name, layer in choice.views.items()}
    return choice.best(scores, idle)


def _idle(layer: LayerView, statistics: Mapping[str, Tensor]) -> list[int]:
    """The experts whose statistics are missing or zero, where some of the layer are not."""
    parts = layer.parts
    found = [
        number
        for number, part in enumerate(parts)
        if part.name not in statistics or not bool(statistics[part.name].any())
    ]
    return found if len(found) < len(parts) else []


def _from_gradients(data: ModelPass, choice: _Choice, candidates: CandidateBudget) -> dict[str, Support]:
    criterion = choice.criterion
    collected = GradientSums(list(choice.views.values()), criterion, candidates)
    collected.run(data)

    def score(part: LayerView, batches: int) -> Tensor:
        sums = collected.sums[part.name]
        weight = part.weight().reshape(-1) if criterion.uses_weight else None
        if weight is not None and sums.positions is not None:
            weight = weight.index_select(0, sums.positions)
        return criterion.score(weight, Statistics(gradient=sums.total, batches=batches))

    def scores(name: str) -> _Scores:
        parts, batches = choice.views[name].parts, collected.batches[name]
        if len(parts) == 1:
            return _Scores(score(parts[0], batches), collected.sums[name].positions)
        found, positions = [], []
        for number, part in enumerate(parts):
            if number not in idle[name]:
                found.append(score(part, batches))
                positions.append(collected.sums[part.name].all_positions + number * part.numel)
        return _Scores(torch.cat(found), torch.cat(positions))

    def complete(name: str) -> _Scores:
        """Blocks have scores of all entries."""
        found, positions = scores(name)
        if positions is None:
            return _Scores(found)
        return _Scores(found.new_zeros(choice.views[name].numel).index_copy_(0, positions, found))

    totals = {name: sums.total for name, sums in collected.sums.items()}
    idle = {name: _idle(layer, totals) for name, layer in choice.views.items()}
    return choice.best(scores if choice.block is None else complete, idle)


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
    seed: int = 0,
) -> dict[str, Support]:
    """Choose each layer's positions from weight gradients that are known already.

    Args:
        layers: the target layers.
        criterion: one that needs gradients; each gradient counts as that of one batch.
        budget: the number of positions, and how the layers share them.
        gradients: ``{layer name or layer name + ".weight": gradient}``, of the shape of the stored weight; other
            parameters' are ignored.
        block: choose blocks of this size instead of entries, by their sums of scores.
        seed: of random positions, which fused experts with gradients of zeros train.

    Returns:
        ``{layer name: support}`` on the gradients' devices.

    Warns:
        RuntimeWarning: experts with gradients of zeros.

    Raises:
        ValueError: another criterion, or a layer without a gradient, or with one of another shape or not finite.
    """
    _check_needs(criterion, "gradient")
    choice = _Choice({layer.name: layer for layer in layers}, criterion, budget, block, seed)
    choice.check_blocks()
    found = given_gradients(choice.shapes, gradients)

    def scores(name: str) -> _Scores:
        gradient = found[name].to(torch.float32)
        stats = Statistics(gradient=gradient.square() if criterion.squared_gradient else gradient)
        return _Scores(criterion.score(choice.views[name].weight() if criterion.uses_weight else None, stats))

    return choice.best(scores, {name: _idle(layer, _by_part(layer, found)) for name, layer in choice.views.items()})


def _by_part(layer: LayerView, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    gradient, parts = gradients[layer.name], layer.parts
    rows = parts[0].shape[0]
    return {part.name: gradient[number * rows : (number + 1) * rows] for number, part in enumerate(parts)}
