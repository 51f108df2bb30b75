"""What a model loses at each sparsity, without training: the curve, its knee, and random pruning beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..constraints import PositiveOrZero, validated
from .masks import Masks, masks_of, record, restore
from .patterns import PatternLike, as_pattern
from .pruning import prune
from .sparsegpt import SparseGPT

Evaluate = Callable[[nn.Module], float]
GRID = tuple(step / 20 for step in range(1, 19))
"""Shares of zeros from 0.05 to 0.9."""


@dataclass(frozen=True)
class CurvePoint:
    """One pruned model.

    Attributes:
        pattern: as it was given.
        sparsity: share of zeros in the pruned layers.
        metric: of the model pruned by its scores.
        random: of the model pruned at random, in the same pattern; None if it was not measured.
    """

    pattern: str
    sparsity: float
    metric: float
    random: float | None


@dataclass(frozen=True)
class SparsityCurve:
    """A metric at growing sparsity.

    Attributes:
        dense: the metric of the model before pruning.
        points: by growing sparsity.
        higher_is_better: of the metric.
    """

    dense: float
    points: tuple[CurvePoint, ...]
    higher_is_better: bool

    def loss(self, metric: float) -> float:
        """By how much a metric is worse than the dense model's, as a share of it."""
        worse = self.dense - metric if self.higher_is_better else metric - self.dense
        return worse / max(abs(self.dense), 1e-12)

    def knee(self, tolerance: float = 0.01) -> float:
        """The largest sparsity up to which every point loses at most ``tolerance`` of the dense metric; 0 for none.

        Raises:
            ValueError: a negative tolerance.
        """
        tolerance = validated("tolerance", tolerance, PositiveOrZero)
        found = 0.0
        for point in self.points:
            if not self.loss(point.metric) <= tolerance:
                break
            found = point.sparsity
        return found

    def chord_knee(self) -> float | None:
        """The sparsity at which the curve is farthest below its chord (Kneedle); None for a curve that does not bend.

        The chord leads from the dense model to the last point with a finite metric. It depends on where the grid
        ends; ``knee`` does not.
        """
        finite = [point for point in self.points if math.isfinite(point.metric)]
        if not finite or self.loss(finite[-1].metric) <= 0:
            return None
        end, most = finite[-1].sparsity, self.loss(finite[-1].metric)
        distance, sparsity = max((p.sparsity / end - self.loss(p.metric) / most, p.sparsity) for p in finite)
        return sparsity if distance > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the fields, and both knees; numbers that are not finite as None."""
        points = [
            {
                key: None if isinstance(value, float) and not math.isfinite(value) else value
                for key, value in row.items()
            }
            for row in map(asdict, self.points)
        ]
        return {
            "dense": self.dense,
            "higher_is_better": self.higher_is_better,
            "points": points,
            "knee": self.knee(),
            "chord_knee": self.chord_knee(),
        }


@torch.no_grad()
def measured(evaluate: Evaluate, model: nn.Module) -> float:
    """The number that ``evaluate`` finds, without gradients."""
    return float(evaluate(model))


@contextmanager
def pruned(
    model: nn.Module, pattern: PatternLike, score: str | SparseGPT = "magnitude", **options: Any
) -> Iterator[Masks]:
    """Inside the block the model is pruned; afterwards it has its weights back, bit for bit, also after an exception.

    Args:
        model: without adapters.
        pattern: of [`prune`][sparse_peft.sparsify.prune].
        score: of [`prune`][sparse_peft.sparsify.prune].
        options: of [`prune`][sparse_peft.sparsify.prune].

    Example:
        >>> import torch
        >>> from sparse_peft.sparsify import pruned
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> with pruned(model, 0.75) as masks:
        ...     print(int((model[0].weight == 0).sum()))
        24
        >>> int((model[0].weight == 0).sum())
        0
    """
    before = masks_of(model)
    try:
        yield prune(model, pattern, score, **{"progress": False, **options}, restorable=True)
    finally:
        if masks_of(model) is not before:
            restore(model)
            if before is not None:
                record(model, before)


def essential_sparsity(
    model: nn.Module,
    evaluate: Evaluate,
    grid: Sequence[PatternLike] = GRID,
    score: str | SparseGPT = "magnitude",
    *,
    higher_is_better: bool = True,
    baseline: bool = True,
    progress: bool = True,
    **options: Any,
) -> SparsityCurve:
    """Measure a model at growing sparsity, pruned in one shot and without training.

    Up to the knee of the curve, weights can go almost for free (Essential Sparsity, https://arxiv.org/abs/2306.03805).
    Random pruning is measured beside it: the gap between the two is what the scores know.

    Args:
        model: without adapters; it has its weights back afterwards, bit for bit.
        evaluate: ``evaluate(model)``: a number; called without gradients.
        grid: patterns, in any order; shares of zeros and n:m may be mixed.
        score: of [`prune`][sparse_peft.sparsify.prune].
        higher_is_better: of the number; False for a loss or a perplexity.
        baseline: measure random pruning too; where ``allocation="global"``, with the same share in every layer.
        progress: show a bar that counts points.
        options: of [`prune`][sparse_peft.sparsify.prune], such as ``allocation`` and ``calibration``.

    Raises:
        ValueError: an empty grid, a number of the dense model that is not finite, or what ``prune`` raises.

    Example:
        >>> import torch
        >>> from sparse_peft.sparsify import essential_sparsity
        >>> model, x = torch.nn.Linear(64, 64, bias=False), torch.randn(256, 64)
        >>> layer, y = torch.nn.Sequential(model), model(x).detach()
        >>> error = lambda layer: 1 + float((layer(x) - y).square().mean())
        >>> curve = essential_sparsity(layer, error, [0.1, 0.5], higher_is_better=False, progress=False)
        >>> curve.points[1].metric < curve.points[1].random
        True
    """
    if not grid:
        raise ValueError("grid=(): at least one pattern is expected, such as 0.5 or '2:4'")
    patterns = sorted(grid, key=lambda given: as_pattern(given).density, reverse=True)
    if options.get("calibration") is not None:
        options["calibration"] = list(options["calibration"])
    dense = measured(evaluate, model)
    if not math.isfinite(dense):
        raise ValueError(f"evaluate(model) is {dense} for the model as it is; nothing can be compared with that")
    points = []
    for pattern in logging.tqdm(patterns, desc="measuring", unit="pattern", disable=not progress):
        with pruned(model, pattern, score, **options) as masks:
            metric = measured(evaluate, model)
        random = _random(model, evaluate, pattern, options) if baseline else None
        points.append(CurvePoint(str(pattern), 1 - masks.density, metric, random))
    return SparsityCurve(dense, tuple(points), higher_is_better)


def _random(model: nn.Module, evaluate: Evaluate, pattern: PatternLike, options: dict[str, Any]) -> float:
    same = {key: value for key, value in options.items() if key not in ("calibration", "refine", "loss_fn")}
    if same.get("allocation") == "global":
        same["allocation"] = "uniform"
    with pruned(model, pattern, "random", **same):
        return measured(evaluate, model)
