"""Supports chosen from data: one pass over batches of an unwrapped model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..numerics.topk import topk_indices
from ..support.blocks import Block, best_blocks, divide_in_blocks, resolve_block_counts
from ..support.budget import Budget, Division, allocate, divide
from ..support.criteria import CRITERIA, Criterion, Statistics
from ..support.support import Support
from .activations import feature_norms
from .gradient_sums import GradientSums, LayerSums

DEFAULT_PANEL_BYTES = 64 * 2**20


def _weight_of(module: nn.Module) -> Tensor:
    return module.weight.detach()


def _in_dim_of(module: nn.Module) -> int:
    return 0 if isinstance(module, Conv1D) else 1


def _shape_of(module: nn.Module, in_dim: int) -> tuple[int, int]:
    """``(rows, cols)`` of the stored weight; quantised layers, which pack theirs, say how large it is."""
    if in_dim == 1 and hasattr(module, "out_features"):
        return module.out_features, module.in_features
    return tuple(module.weight.shape)


def _check_needs(criterion: Criterion, *needs: str) -> None:
    if criterion.needs not in needs:
        fitting = ", ".join(other.name for other in CRITERIA.values() if other.needs in needs)
        raise ValueError(f"selection={criterion.name!r} is computed from {_SOURCES[criterion.needs]}; use {fitting}")


_SOURCES = {
    "none": "a seed and no data: use Support.random",
    "weight": "the weights and no data: use select",
    "gradient": "gradients, not activations",
    "activation": "activations, not gradients",
}


@torch.no_grad()
def _choose(
    shapes: dict[str, tuple[int, int]],
    criterion: Criterion,
    budget: Budget,
    scores: Callable[[str], Tensor],
    candidates: Callable[[str], Tensor | None] = lambda name: None,
    block: Block | None = None,
) -> dict[str, Support]:
    """The best scored positions of every layer, one layer's scores at a time.

    ``scores(name)`` are those of all entries, or of ``candidates(name)`` where that is not None.
    """
    if block is not None:
        return _choose_blocks(shapes, criterion, budget, scores, block)
    division = divide(shapes, budget)
    counts = allocate(division, budget.allocation, scores, criterion.largest)
    supports = {}
    for name, shape in division.shapes.items():
        chosen = topk_indices(scores(name).reshape(-1), counts[name], criterion.largest, name=name)
        positions = candidates(name)
        supports[name] = Support(shape, chosen if positions is None else positions[chosen], validate=False, name=name)
    return supports


def _choose_blocks(
    shapes: dict[str, tuple[int, int]],
    criterion: Criterion,
    budget: Budget,
    scores: Callable[[str], Tensor],
    block: Block,
) -> dict[str, Support]:
    """The blocks with the best sums of scores; ``scores(name)`` are those of all entries."""

    def matrix(name: str) -> Tensor:
        return scores(name).view(shapes[name])

    counts = resolve_block_counts(shapes, budget, block, matrix, criterion.largest)
    per_block = block[0] * block[1]
    return {
        name: best_blocks(matrix(name), counts[name] // per_block, block, criterion.largest, name) for name in shapes
    }


def _candidate_groups(division: Division, budget: Budget) -> tuple[dict[str, str | None], dict[str | None, int]]:
    """Which layers share candidates, ``{layer: group}``, and ``{group: entries to train}``."""
    if budget.allocation != "global":
        return {name: name for name in division.shapes}, allocate(division, budget.allocation)
    groups = {name: name if name in division.own else None for name in division.shapes}
    return groups, {**division.own, None: division.total}


def collect_supports(
    model: nn.Module,
    targets: dict[str, nn.Module],
    criterion: Criterion,
    budget: Budget,
    batches: Iterable,
    *,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    weight_of: Callable[[nn.Module], Tensor] = _weight_of,
    in_dim_of: Callable[[nn.Module], int] = _in_dim_of,
    oversample: float = 8.0,
    panel_bytes: int = DEFAULT_PANEL_BYTES,
    block: Block | None = None,
) -> dict[str, Support]:
    """Choose each layer's positions from data, in one pass over the batches.

    Criteria that need gradients see each layer's weight gradient for a moment, in blocks of rows. The first batch
    that reaches a layer proposes ``oversample`` candidates for each entry to train, and all batches are summed at
    the candidates only. With one batch that is exact; with several, an entry that the first batch ranks lower than
    ``oversample`` times the budget cannot be chosen. Where the candidates would be all entries, all are summed, so
    ``oversample=float("inf")`` is always exact, for eight bytes for each weight of all targets. With
    ``allocation="global"`` the candidates are the best of all layers together.

    Nothing of the model changes: no ``.grad`` is filled, ``requires_grad`` and hooks are as before, also after an
    exception, and it runs in the mode (training or evaluation) it is in.

    Args:
        model: the base model, without adapters.
        targets: ``{layer name: linear layer}`` in the model's order.
        criterion: one that needs gradients or activations.
        budget: how many positions, and how the layers share them.
        batches: iterated once; tensors in them are moved to the model's device. A batch is a micro-batch.
        loss_fn: ``loss_fn(model, batch) -> scalar``; default ``model(**batch).loss``. Criteria that need activations
            alone run ``model(**batch)``.
        weight_of: gives a layer's weight in floats, as stored.
        in_dim_of: which dimension of the stored weight counts the input features: 1 in ``nn.Linear``, 0 in
            ``Conv1D``.
        oversample: candidates for each trained entry, at least 1.
        panel_bytes: limit, in bytes, of a temporary that grows with a weight.
        block: choose blocks of this size instead of entries, by their sums of scores. All entries are summed then, as
            with ``oversample=float("inf")``: no few candidates tell which block is best.

    Returns:
        ``{layer name: support}`` on the layers' devices.

    Warns:
        RuntimeWarning: a batch with a loss, gradients or inputs that are not finite is skipped.

    Raises:
        TypeError: batches that are no mappings, without ``loss_fn``.
        ValueError: a criterion that needs no data, no usable batch, a layer that the data never reached, or a budget
            that does not fit.
    """
    _check_needs(criterion, "gradient", "activation")
    if isinstance(oversample, bool) or not isinstance(oversample, Real) or not oversample >= 1:
        raise ValueError(f"oversample={oversample!r}: a number of at least 1 is expected")
    if panel_bytes < 1:
        raise ValueError(f"panel_bytes={panel_bytes}: a positive number of bytes is expected")
    in_dims = {name: in_dim_of(module) for name, module in targets.items()}
    shapes = {name: _shape_of(module, in_dims[name]) for name, module in targets.items()}
    division = divide(shapes, budget)
    if criterion.needs == "activation":
        norms = feature_norms(model, targets, batches, loss_fn=loss_fn, panel_bytes=panel_bytes)

        def score(name: str) -> Tensor:
            stats = Statistics(input_norms=norms[name])
            return criterion.score(weight_of(targets[name]), stats, in_dim=in_dims[name])

        return _choose(shapes, criterion, budget, score, block=block)
    if block is not None:
        divide_in_blocks(shapes, budget, block)  # raises before the model runs
        oversample = float("inf")
    layers = {
        name: LayerSums(shape, in_dims[name], lambda module=targets[name]: weight_of(module))
        for name, shape in shapes.items()
    }
    groups, budgets = _candidate_groups(division, budget)
    GradientSums(layers, criterion, groups, budgets, oversample, panel_bytes).run(model, targets, batches, loss_fn)

    def score_candidates(name: str) -> Tensor:
        layer = layers[name]
        stats = Statistics(gradient=layer.total, batches=layer.batches)
        weight = layer.weight().reshape(-1) if criterion.uses_weight else None
        if weight is not None and layer.positions is not None:
            weight = weight.index_select(0, layer.positions)
        return criterion.score(weight, stats)

    return _choose(shapes, criterion, budget, score_candidates, lambda name: layers[name].positions, block)


def given_gradients(shapes: dict[str, tuple[int, int]], gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """The layers' weight gradients among others that are known.

    Args:
        shapes: ``{layer name: (rows, cols)}`` of the stored weights.
        gradients: ``{layer name or layer name + ".weight": gradient}``; those of other parameters are ignored.

    Raises:
        ValueError: a layer has none, or one of another shape or that is not finite.
    """
    found = {}
    for name, shape in shapes.items():
        gradient = gradients.get(name, gradients.get(f"{name}.weight"))
        if gradient is None:
            raise ValueError(
                f"layer {name}: gradients has neither {name!r} nor '{name}.weight'; its names are "
                f"{', '.join(map(repr, list(gradients)[:3]))}{', ...' if len(gradients) > 3 else ''}"
            )
        if tuple(gradient.shape) != shape:
            raise ValueError(
                f"layer {name}: a gradient of shape {tuple(gradient.shape)} for a weight stored as {shape}"
            )
        if not bool(gradient.isfinite().all()):
            raise ValueError(f"layer {name}: its gradient has NaN or infinite numbers; use that of another batch")
        found[name] = gradient.detach()
    return found


def supports_from_gradients(
    targets: dict[str, nn.Module],
    criterion: Criterion,
    budget: Budget,
    gradients: dict[str, Tensor],
    *,
    weight_of: Callable[[nn.Module], Tensor] = _weight_of,
    in_dim_of: Callable[[nn.Module], int] = _in_dim_of,
    block: Block | None = None,
) -> dict[str, Support]:
    """Choose each layer's positions from weight gradients that are known already.

    Args:
        targets: ``{layer name: linear layer}``.
        criterion: one that needs gradients; each gradient counts as that of one batch.
        budget: how many positions, and how the layers share them.
        gradients: ``{layer name or layer name + ".weight": gradient}``, of the shape of the stored weight. Those of
            other parameters are ignored.
        weight_of: gives a layer's weight in floats, as stored.
        in_dim_of: which dimension of the stored weight counts the input features.
        block: choose blocks of this size instead of entries, by their sums of scores.

    Returns:
        ``{layer name: support}`` on the gradients' devices.

    Raises:
        ValueError: another criterion, a layer without a gradient, or one of another shape or that is not finite.
    """
    _check_needs(criterion, "gradient")
    shapes = {name: _shape_of(module, in_dim_of(module)) for name, module in targets.items()}
    found = given_gradients(shapes, gradients)

    def score(name: str) -> Tensor:
        gradient = found[name].to(torch.float32)
        stats = Statistics(gradient=gradient.square() if criterion.squared_gradient else gradient)
        return criterion.score(weight_of(targets[name]) if criterion.uses_weight else None, stats)

    return _choose(shapes, criterion, budget, score, block=block)
