"""Scores that say which entries of a weight are worth training.

Adding a criterion is one entry of [`CRITERIA`][sparse_peft.support.CRITERIA].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .support import Support

NEEDS = ("none", "weight", "gradient", "activation")


@dataclass(frozen=True)
class Statistics:
    """What was seen of one layer in the data.

    Attributes:
        gradient: float32 sum over micro-batches of the weight's gradient, or of its square for criteria with
            ``squared_gradient``; of any shape that the weight is given in.
        batches: number of micro-batches in that sum.
        input_norms: ``(in_features,)`` float32: L2 norm over all tokens of each input feature.
    """

    gradient: Tensor | None = None
    batches: int = 1
    input_norms: Tensor | None = None


@dataclass(frozen=True)
class Criterion:
    """One way to score the entries of a weight.

    Attributes:
        name: as in ``selection=``.
        needs: ``"none"``, ``"weight"``, ``"gradient"`` or ``"activation"``: what the score is computed from.
        score: ``score(weight, stats, **options)``: float32 scores of the weight's shape; None if nothing is scored.
            Criteria that need gradients are elementwise: they are also called on blocks of rows and on 1-D tensors
            of chosen entries, with ``stats.gradient`` to match.
        largest: whether large scores are trained.
        squared_gradient: whether ``stats.gradient`` sums squares.
        uses_weight: whether the score reads the weight; if not, ``weight`` may be None.
        count: ``count(weight, **options)``: number of entries that train, for criteria that decide it themselves.
    """

    name: str
    needs: str
    score: Callable[..., Tensor] | None
    largest: bool = True
    squared_gradient: bool = False
    uses_weight: bool = True
    count: Callable[..., int] | None = None

    def __post_init__(self):
        if self.needs not in NEEDS:
            raise ValueError(f"criterion {self.name}: needs={self.needs!r}; one of {', '.join(NEEDS)} is expected")


def _magnitude(weight: Tensor) -> Tensor:
    if not weight.is_floating_point():
        raise TypeError(f"a weight of dtype {weight.dtype} cannot be scored; dequantise it to floats first")
    return weight.detach().abs().to(torch.float32)


def _score_magnitude(weight: Tensor, stats: Statistics | None = None) -> Tensor:
    return _magnitude(weight)


def _count_below(weight: Tensor, threshold: float) -> int:
    return int((_magnitude(weight) < threshold).sum())


def _score_threshold(weight: Tensor, stats: Statistics | None = None, *, threshold: float) -> Tensor:
    magnitude = _magnitude(weight)
    return magnitude.masked_fill_(magnitude >= threshold, torch.inf)


def _score_gradient(weight: Tensor | None, stats: Statistics) -> Tensor:
    return stats.gradient.abs() / stats.batches


def _score_fisher(weight: Tensor | None, stats: Statistics) -> Tensor:
    return stats.gradient / stats.batches


def _score_movement(weight: Tensor, stats: Statistics) -> Tensor:
    return weight.detach().to(torch.float32) * stats.gradient.neg()


def _score_wanda(weight: Tensor, stats: Statistics, *, in_dim: int = 1) -> Tensor:
    norms = stats.input_norms
    if in_dim not in (0, 1):
        raise ValueError(f"in_dim={in_dim!r}: the weight's dimension of input features, 0 or 1, is expected")
    if norms.shape != (weight.shape[in_dim],):
        raise ValueError(
            f"input norms of shape {tuple(norms.shape)} for a weight of shape {tuple(weight.shape)}, whose dimension "
            f"{in_dim} counts the input features; weights stored (in, out) need in_dim=0"
        )
    norms = norms.to(weight.device, torch.float32)
    return _magnitude(weight).mul_(norms[:, None] if in_dim == 0 else norms)


def principal_factors(
    multiply: Callable[[Tensor], Tensor],
    multiply_transposed: Callable[[Tensor], Tensor],
    shape: tuple[int, int],
    rank: int,
    *,
    seed: int = 0,
    like: Tensor,
) -> tuple[Tensor, Tensor]:
    """The best approximation of a matrix of a rank, by subspace iteration (Halko, Martinsson and Tropp 2011, 4.4).

    The random test matrix has its own generator on the CPU: the same on every device, and no global state changes.

    Args:
        multiply: the matrix times ``(cols, columns)``.
        multiply_transposed: its transpose times ``(rows, columns)``.
        shape: its ``(rows, cols)``.
        rank: of the approximation.
        seed: of the test matrix.
        like: a tensor of the dtype and on the device to compute in.

    Returns:
        ``(rows, rank)`` and ``(rank, cols)``, whose product is the approximation; fewer ranks if there are no more.
    """
    oversampled = min(2 * rank, *shape)
    generator = torch.Generator().manual_seed(seed)
    test = torch.randn(shape[1], oversampled, generator=generator).to(like)
    basis = torch.linalg.qr(multiply(test)).Q
    for _ in range(4):
        basis = torch.linalg.qr(multiply_transposed(basis)).Q
        basis = torch.linalg.qr(multiply(basis)).Q
    u, s, vh = torch.linalg.svd(multiply_transposed(basis).t(), full_matrices=False)
    return basis @ (u[:, :rank] * s[:rank]), vh[:rank]


def _approximation(weight: Tensor, r: int, seed: int) -> Tensor:
    """The best rank-``r`` approximation, float32."""
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise ValueError(f"r={r!r}: a rank of at least 1 is expected")
    if not weight.is_floating_point():
        raise TypeError(f"a weight of dtype {weight.dtype} cannot be scored; dequantise it to floats first")
    weight = weight.detach().to(torch.float32)
    left, right = principal_factors(
        lambda x: weight @ x, lambda x: weight.t() @ x, tuple(weight.shape), r, seed=seed, like=weight
    )
    return torch.mm(left, right)


def _score_principal(weight: Tensor, stats: Statistics | None = None, *, r: int = 32, seed: int = 0) -> Tensor:
    return _approximation(weight, r, seed).abs_()


def _score_residual(weight: Tensor, stats: Statistics | None = None, *, r: int = 32, seed: int = 0) -> Tensor:
    return _approximation(weight, r, seed).sub_(weight.detach()).abs_()


CRITERIA: dict[str, Criterion] = {
    criterion.name: criterion
    for criterion in (
        Criterion("random", "none", None, uses_weight=False),
        Criterion("magnitude", "weight", _score_magnitude),
        Criterion("magnitude_smallest", "weight", _score_magnitude, largest=False),
        # SaRA, section 3.2
        Criterion("threshold", "weight", _score_threshold, largest=False, count=_count_below),
        # LIFT, section 3
        Criterion("principal", "weight", _score_principal),
        # The intent of DSEE, section 3, with a truncated decomposition in place of GreBsmo
        Criterion("residual", "weight", _score_residual),
        # SIFT, section 3.2, with the mean over batches instead of the first
        Criterion("gradient", "gradient", _score_gradient, uses_weight=False),
        # FISH Mask, section 3: the empirical Fisher information, per micro-batch
        Criterion("fisher", "gradient", _score_fisher, squared_gradient=True, uses_weight=False),
        # movement pruning, section 3: entries that a step of gradient descent makes larger
        Criterion("movement", "gradient", _score_movement),
        # Wanda, section 3
        Criterion("wanda", "activation", _score_wanda),
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
        k: how many. For criteria that decide it themselves None, or the number they arrive at.
        seed: of the random criterion, together with ``name``.
        name: the layer's name.
        stats: what was seen of the layer, for criteria that need data.
        options: further arguments of the criterion's score.

    Raises:
        ValueError: missing statistics, ``k`` out of range, or scores that are NaN.
    """
    criterion = get_criterion(criterion) if isinstance(criterion, str) else criterion
    options = dict(options or {})
    where = f"layer {name}: " if name else ""
    if criterion.count is not None:
        counted = criterion.count(weight, **options)
        if k not in (None, counted):
            raise ValueError(
                f"{where}selection={criterion.name!r} with {options} finds {counted} entries, not {k}; the weight is "
                "not the one they were counted in"
            )
        k = counted
    if k is None:
        raise ValueError(f"{where}k=None: selection={criterion.name!r} needs the number of entries")
    if criterion.needs == "none":
        return Support.random(tuple(weight.shape), k, seed=seed, name=name)
    if criterion.needs != "weight" and stats is None:
        raise ValueError(f"{where}selection={criterion.name!r} needs statistics of the data: pass stats=")
    return Support.from_scores(criterion.score(weight, stats, **options), k, criterion.largest, name)
