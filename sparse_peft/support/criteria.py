"""Scores that say which entries of a weight are worth training.

A new criterion is a subclass of [`Criterion`][sparse_peft.support.Criterion] and one entry of
[`CRITERIA`][sparse_peft.support.CRITERIA].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..constraints import Count, validated
from ..numerics.low_rank import principal_factors
from .support import Support

NEEDS = ("none", "weight", "gradient", "activation", "positions")


@dataclass(frozen=True)
class Statistics:
    """Statistics of one layer over data.

    Attributes:
        gradient: float32 sum over micro-batches of the weight's gradient, or of its square for criteria with
            ``squared_gradient``; of the shape that the weight is given in.
        batches: number of micro-batches in that sum.
        input_norms: ``(in_features,)`` float32: L2 norm of each input feature over all tokens.
    """

    gradient: Tensor | None = None
    batches: int = 1
    input_norms: Tensor | None = None


class Criterion(ABC):
    """One way to score the entries of a weight.

    Attributes:
        name: as in ``selection=``.
        needs: what the score is computed from: ``"none"``, ``"weight"``, ``"gradient"`` or ``"activation"``;
            ``"positions"`` if nothing is scored.
        largest: whether the largest scores train.
        decides_count: whether the criterion decides the number of entries, instead of a budget.
        draws: whether positions are drawn at random, without scores.
        restricts: whether some entries may not train; see ``eligible``.
        squared_gradient: whether ``Statistics.gradient`` sums squares.
        uses_weight: whether the score reads the weight; if not, the weight may be None.
    """

    name: ClassVar[str]
    needs: ClassVar[str]
    largest: ClassVar[bool] = True
    decides_count: ClassVar[bool] = False
    draws: ClassVar[bool] = False
    restricts: ClassVar[bool] = False
    squared_gradient: ClassVar[bool] = False
    uses_weight: ClassVar[bool] = True

    @abstractmethod
    def score(self, weight: Tensor | None, stats: Statistics | None = None, **options: Any) -> Tensor:
        """Scores of a weight's entries.

        Criteria that need gradients are elementwise. They are also called on panels of rows and on 1-D tensors of
        chosen entries, with ``stats.gradient`` to match.

        Args:
            weight: floats, as stored.
            stats: of the layer, for criteria that need data.
            options: of the criterion.

        Returns:
            float32 scores of the weight's shape.

        Raises:
            TypeError: a weight that is not of floats.
            ValueError: a missing weight or missing statistics.
        """

    def count(self, weight: Tensor, **options: Any) -> int:
        """Number of entries that train, for criteria with ``decides_count``.

        Raises:
            ValueError: the number comes from a budget.
        """
        raise ValueError(f"selection={self.name!r} finds no number of entries by itself; give a budget")

    def eligible(self, weight: Tensor) -> Tensor | None:
        """Which entries may train, as a bool tensor of the weight's shape; None for all."""
        return None


def _floats(weight: Tensor | None, criterion: Criterion) -> Tensor:
    """The weight without its history, checked."""
    if weight is None:
        raise ValueError(f"selection={criterion.name!r} is computed from the weight, which is not given")
    if not weight.is_floating_point():
        raise TypeError(f"a weight of dtype {weight.dtype} cannot be scored; dequantise it to floats first")
    return weight.detach()


def _magnitude(weight: Tensor) -> Tensor:
    return weight.abs().to(torch.float32)


class Random(Criterion):
    """Positions drawn at random; nothing is scored."""

    name = "random"
    needs = "none"
    draws = True
    uses_weight = False

    def score(self, weight: Tensor | None, stats: Statistics | None = None, **options: Any) -> Tensor:
        raise ValueError(f"selection={self.name!r} draws positions and has no scores")


class Given(Criterion):
    """Positions that are handed in; nothing is scored or counted."""

    name = "given"
    needs = "positions"
    decides_count = True
    uses_weight = False

    def score(self, weight: Tensor | None, stats: Statistics | None = None, **options: Any) -> Tensor:
        raise self.missing()

    def count(self, weight: Tensor, **options: Any) -> int:
        raise self.missing()

    def missing(self, where: str = "") -> ValueError:
        """The error for positions that are not there; ``where`` names the layer."""
        return ValueError(
            f"{where}selection={self.name!r} takes positions from you, and there are none: call `config = "
            "sparse_peft.select_support(model, config, supports={layer: positions})` before `get_peft_model(model, "
            "config)`"
        )


class Nonzero(Random):
    """Positions drawn at random among the entries that are not zero, so that a pruned weight keeps its zeros."""

    name = "nonzero"
    needs = "weight"
    restricts = True
    uses_weight = True

    def eligible(self, weight: Tensor) -> Tensor:
        return _floats(weight, self) != 0


# ------------------------------------------------------------------------------------------------------------- weights


class WeightCriterion(Criterion):
    """Scores from the weight alone."""

    needs = "weight"

    def score(self, weight: Tensor | None, stats: Statistics | None = None, **options: Any) -> Tensor:
        return self.score_weight(_floats(weight, self), **options)

    @abstractmethod
    def score_weight(self, weight: Tensor, *args: Any, **options: Any) -> Tensor:
        """Scores of a weight of floats, as a new float32 tensor."""


class Magnitude(WeightCriterion):
    """The largest absolute weights."""

    name = "magnitude"

    def score_weight(self, weight: Tensor) -> Tensor:
        return _magnitude(weight)


class SmallestMagnitude(Magnitude):
    """The smallest absolute weights."""

    name = "magnitude_smallest"
    largest = False


class Threshold(WeightCriterion):
    """All absolute weights below a threshold (SaRA, section 3.2, https://arxiv.org/abs/2409.06633)."""

    name = "threshold"
    largest = False
    decides_count = True

    def score_weight(self, weight: Tensor, *, threshold: float) -> Tensor:
        magnitude = _magnitude(weight)
        return magnitude.masked_fill_(magnitude >= threshold, torch.inf)

    def count(self, weight: Tensor, **options: Any) -> int:
        return int((_magnitude(_floats(weight, self)) < options["threshold"]).sum())


class Principal(WeightCriterion):
    """The largest entries of the best rank-``r`` approximation (LIFT, section 3, https://arxiv.org/abs/2506.00772)."""

    name = "principal"

    def score_weight(self, weight: Tensor, *, r: int = 32, seed: int = 0) -> Tensor:
        return _approximation(weight, r, seed).abs_()


class Residual(WeightCriterion):
    """The largest errors of the best rank-``r`` approximation.

    This is the intent of DSEE, section 3 (https://arxiv.org/abs/2111.00160), with a truncated singular value
    decomposition in place of GreBsmo.
    """

    name = "residual"

    def score_weight(self, weight: Tensor, *, r: int = 32, seed: int = 0) -> Tensor:
        return _approximation(weight, r, seed).sub_(weight).abs_()


def _approximation(weight: Tensor, r: int, seed: int) -> Tensor:
    """The best rank-``r`` approximation, float32."""
    r = validated("r", r, Count)
    weight = weight.to(torch.float32)
    rows, cols = weight.shape
    left, right = principal_factors(
        lambda x: weight @ x, lambda x: weight.t() @ x, (rows, cols), r, seed=seed, like=weight
    )
    return torch.mm(left, right)


# ----------------------------------------------------------------------------------------------------------- gradients


class GradientCriterion(Criterion):
    """Elementwise scores from sums of gradients."""

    needs = "gradient"

    def score(self, weight: Tensor | None, stats: Statistics | None = None, **options: Any) -> Tensor:
        if stats is None or stats.gradient is None:
            raise ValueError(
                f"selection={self.name!r} is computed from gradients: pass stats=Statistics(gradient=...)"
            )
        return self.score_gradient(weight, stats.gradient, stats.batches, **options)

    @abstractmethod
    def score_gradient(self, weight: Tensor | None, gradient: Tensor, batches: int) -> Tensor:
        """Scores from the sum of ``batches`` gradients."""


class Gradient(GradientCriterion):
    """The largest mean gradients (SIFT, section 3.2, https://arxiv.org/abs/2312.11875; there the first batch's)."""

    name = "gradient"
    uses_weight = False

    def score_gradient(self, weight: Tensor | None, gradient: Tensor, batches: int) -> Tensor:
        return gradient.abs() / batches


class Fisher(GradientCriterion):
    """The largest empirical Fisher information of micro-batches (FISH Mask, section 3, https://arxiv.org/abs/2111.09839)."""

    name = "fisher"
    squared_gradient = True
    uses_weight = False

    def score_gradient(self, weight: Tensor | None, gradient: Tensor, batches: int) -> Tensor:
        return gradient / batches


class Gallop(GradientCriterion):
    """Large mean gradients on small weights: ``|g| / (|w| + 1e-8)`` (GaLLoP, https://arxiv.org/abs/2510.19778)."""

    name = "gallop"
    epsilon: ClassVar[float] = 1e-8  # the paper's, which keeps the quotient of a zero weight finite

    def score_gradient(self, weight: Tensor | None, gradient: Tensor, batches: int) -> Tensor:
        return (gradient.abs() / batches).div_(_magnitude(_floats(weight, self)).add_(self.epsilon))


class Movement(GradientCriterion):
    """Entries that gradient descent makes larger (movement pruning, section 3, https://arxiv.org/abs/2005.07683)."""

    name = "movement"

    def score_gradient(self, weight: Tensor | None, gradient: Tensor, batches: int) -> Tensor:
        return _floats(weight, self).to(torch.float32) * gradient.neg()


class Snip(Movement):
    """The entries whose removal changes the loss most: ``|w * g|`` (SNIP, section 4, https://arxiv.org/abs/1810.02340)."""

    name = "snip"

    def score_gradient(self, weight: Tensor | None, gradient: Tensor, batches: int) -> Tensor:
        return super().score_gradient(weight, gradient, batches).abs_()


# --------------------------------------------------------------------------------------------------------- activations


class ActivationCriterion(Criterion):
    """Scores from the norms of input features."""

    needs = "activation"

    def score(self, weight: Tensor | None, stats: Statistics | None = None, **options: Any) -> Tensor:
        if stats is None or stats.input_norms is None:
            raise ValueError(
                f"selection={self.name!r} is computed from activations: pass stats=Statistics(input_norms=...)"
            )
        return self._score(_floats(weight, self), stats.input_norms, **options)

    def _score(self, weight: Tensor, norms: Tensor, *, in_dim: int = 1) -> Tensor:
        """Checks the norms; ``in_dim`` is the weight's dimension of input features."""
        if in_dim not in (0, 1):
            raise ValueError(f"in_dim={in_dim!r}: the weight's dimension of input features, 0 or 1, is expected")
        if norms.shape != (weight.shape[in_dim],):
            raise ValueError(
                f"input norms of shape {tuple(norms.shape)} for a weight of shape {tuple(weight.shape)}, whose "
                f"dimension {in_dim} counts the input features; weights stored (in, out) need in_dim=0"
            )
        return self.score_inputs(weight, norms.to(weight.device, torch.float32).unsqueeze(1 - in_dim), in_dim)

    @abstractmethod
    def score_inputs(self, weight: Tensor, norms: Tensor, in_dim: int) -> Tensor:
        """Scores from float32 norms that broadcast over the weight."""


class Wanda(ActivationCriterion):
    """The largest products of weight and input norm (Wanda, section 3, https://arxiv.org/abs/2306.11695)."""

    name = "wanda"

    def score_inputs(self, weight: Tensor, norms: Tensor, in_dim: int) -> Tensor:
        return _magnitude(weight).mul_(norms)


class NoWag(ActivationCriterion):
    """The largest normalised weights, times input norms (NoWag, section 3, https://arxiv.org/abs/2504.14569).

    The weights of each input are divided by their L2 norm, then those of each output by theirs. The paper's score, of
    which this is the square root, ranks the entries of a weight alike.
    """

    name = "nowag"
    tiniest: ClassVar[float] = torch.finfo(torch.float32).tiny  # so that the weights of a pruned channel stay 0

    def score_inputs(self, weight: Tensor, norms: Tensor, in_dim: int) -> Tensor:
        scores = _magnitude(weight)
        for dim in (1 - in_dim, in_dim):
            scores.div_(torch.linalg.vector_norm(scores, dim=dim, keepdim=True).clamp_(min=self.tiniest))
        return scores.mul_(norms)


CRITERIA: dict[str, Criterion] = {
    criterion.name: criterion
    for criterion in (
        Random(),
        Given(),
        Magnitude(),
        SmallestMagnitude(),
        Threshold(),
        Principal(),
        Residual(),
        Nonzero(),
        Gradient(),
        Fisher(),
        Gallop(),
        Movement(),
        Snip(),
        Wanda(),
        NoWag(),
    )
}
"""Criteria for single entries, by name."""


def get_criterion(name: str) -> Criterion:
    """The criterion of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in CRITERIA:
        raise ValueError(f"selection={name!r} is not known; one of {', '.join(CRITERIA)} is expected")
    return CRITERIA[name]


def _entries(criterion: Criterion, weight: Tensor, k: int | None, options: Mapping[str, Any], where: str) -> int:
    """How many entries train: ``k``, or the number that the criterion decides."""
    if criterion.decides_count:
        counted = criterion.count(weight, **options)
        if k not in (None, counted):
            raise ValueError(
                f"{where}selection={criterion.name!r} with {options} finds {counted} entries, not {k}; the weight is "
                "not the one they were counted in"
            )
        return counted
    if k is None:
        raise ValueError(f"{where}k=None: selection={criterion.name!r} needs the number of entries")
    return k


def select(
    criterion: Criterion | str,
    weight: Tensor,
    k: int | None,
    *,
    seed: int = 0,
    name: str = "",
    stats: Statistics | None = None,
    options: Mapping[str, Any] | None = None,
) -> Support:
    """Choose ``k`` positions of one weight.

    Args:
        criterion: a criterion or its name.
        weight: ``(rows, cols)`` floats, as stored.
        k: number of positions. For criteria that decide it themselves, None or the number they find.
        seed: of the criteria that draw, together with ``name``.
        name: the layer's name.
        stats: of the layer, for criteria that need data.
        options: of the criterion's score.

    Raises:
        ValueError: missing statistics, ``k`` out of range, or scores that are NaN.

    Example:
        >>> import torch
        >>> from sparse_peft.support import select
        >>> select("magnitude", torch.tensor([[1.0, -5.0], [4.0, 2.0]]), k=2).indices.tolist()
        [1, 2]
    """
    criterion = get_criterion(criterion) if isinstance(criterion, str) else criterion
    options = dict(options or {})
    where = f"layer {name}: " if name else ""
    k = _entries(criterion, weight, k, options, where)
    if criterion.draws:
        rows, cols = weight.shape
        return Support.random((rows, cols), k, seed=seed, name=name, among=criterion.eligible(weight))
    if criterion.needs != "weight" and stats is None:
        raise ValueError(f"{where}selection={criterion.name!r} needs statistics of the data: pass stats=")
    return Support.from_scores(criterion.score(weight, stats, **options), k, criterion.largest, name)
