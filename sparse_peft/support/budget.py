"""The number of entries that each layer trains."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Annotated

import torch
from torch import Tensor

from ..constraints import Count, CountOrZero, OneOf, Pattern, Share, validate_fields
from ..numerics.topk import RunningTopK, topk_indices
from .criteria import CRITERIA

Caps = Mapping[str, int]
"""``{layer name: entries}`` that a layer may train at most."""

ALLOCATIONS = ("numel", "uniform", "erk", "global")
"""Ways to share a budget between layers; see [`Budget`][sparse_peft.support.Budget]."""


@dataclass(frozen=True)
class Budget:
    """The total number of trained entries, and how the layers share it.

    Exactly one of ``density``, ``num_params`` and ``r`` is given.

    Args:
        density: share of the weights that trains, in (0, 1].
        num_params: number of trained entries over all layers.
        r: LoRA-rank equivalent: ``r * (rows + cols)`` summed over the layers.
        density_pattern: ``{layer name, suffix or regular expression: density}``; the first key that matches a layer
            sets its density, and the layer does not share the rest of the budget.
        allocation: how the other layers share the rest. ``"numel"``: in proportion to their sizes; ``"uniform"``:
            equally; ``"erk"``: in proportion to ``rows + cols`` (RigL, section 3, https://arxiv.org/abs/1911.11134);
            ``"global"``: by the best scores of all layers.
        matrices: ``{layer name: n}`` of layers whose weight is ``n`` matrices one above the other, as of fused
            experts: each counts as a layer of its own, and may get none of its weight's entries.
        at_least: minimum number of entries of a sharing layer, or all of its entries; 1 for ``"global"``. A smaller
            total is raised to the sum of the minima.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: none or several budgets, or a value out of range.

    Example:
        >>> from sparse_peft.support import Budget, resolve_counts
        >>> shapes = {"q": (100, 100), "v": (100, 20)}
        >>> resolve_counts(shapes, Budget(density=0.01))
        {'q': 100, 'v': 20}
        >>> resolve_counts(shapes, Budget(density=0.01, allocation="erk"))
        {'q': 75, 'v': 45}
    """

    density: Share | None = None
    num_params: Count | None = None
    r: Count | None = None
    density_pattern: dict[Pattern, Share] = field(default_factory=dict)
    allocation: Annotated[str, OneOf(ALLOCATIONS)] = "numel"
    at_least: CountOrZero = 1
    matrices: dict[str, Count] = field(default_factory=dict)

    def __post_init__(self) -> None:
        validate_fields(self)
        given = [name for name in ("density", "num_params", "r") if getattr(self, name) is not None]
        if len(given) != 1:
            values = ", ".join(f"{name}={getattr(self, name)!r}" for name in given) or "none of them"
            raise ValueError(f"exactly one of density, num_params and r is expected, but {values} is given")


def apportion(weights: Sequence[float], caps: Sequence[int], total: int, floor: int = 1) -> list[int]:
    """Share ``total`` in proportion to ``weights``, exactly, between ``floor`` and ``caps``.

    The excess over a cap is shared by the other parts in proportion. Fractions are rounded by largest remainder, ties
    by lowest position. A part whose cap is below ``floor`` gets its cap.

    Args:
        weights: one finite number of at least 0 for each part.
        caps: maximum of each part.
        total: the sum of the result.
        floor: minimum of each part.

    Raises:
        ValueError: ``total`` cannot be reached within the bounds, or bad weights.

    Example:
        >>> from sparse_peft.support import apportion
        >>> apportion([1.0, 2.0, 3.0], [10, 10, 10], 12)
        [2, 4, 6]
    """
    if len(weights) != len(caps):
        raise ValueError(f"{len(weights)} weights for {len(caps)} caps: one each is expected")
    for weight in weights:
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"weights contain {weight!r}: finite numbers of at least 0 are expected")
    floors = [min(floor, cap) for cap in caps]
    if not sum(floors) <= total <= sum(caps):
        raise ValueError(f"total={total}: between {sum(floors)} and {sum(caps)} can be shared within the bounds")

    # exact rational numbers: sums of billions keep their last unit, and equal layers get equal shares
    shares = [Fraction(0)] * len(caps)
    free = list(range(len(caps)))
    rest = Fraction(total)
    while free:
        scale = sum(Fraction(weights[i]) for i in free)
        wanted = {i: rest * Fraction(weights[i]) / scale if scale else rest / len(free) for i in free}
        above = [i for i in free if wanted[i] > caps[i]]
        below = [i for i in free if wanted[i] < floors[i]]
        surplus = sum(wanted[i] - caps[i] for i in above)
        shortage = sum(floors[i] - wanted[i] for i in below)
        # the larger of the two violations fixes its parts at their bound; the other may vanish with the new scale
        fixed = above if surplus >= shortage else below
        if not fixed:
            for i in free:
                shares[i] = wanted[i]
            break
        for i in fixed:
            shares[i] = Fraction(caps[i] if surplus >= shortage else floors[i])
            rest -= shares[i]
        free = [i for i in free if i not in set(fixed)]

    counts = [math.floor(share) for share in shares]
    by_remainder = sorted(range(len(caps)), key=lambda i: (counts[i] - shares[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def matches_layer(pattern: str, name: str) -> bool:
    """Whether a key of a ``*_pattern`` field matches a layer: its name, a suffix of it or a regular expression.

    Example:
        >>> from sparse_peft.support import matches_layer
        >>> matches_layer("q_proj", "model.layers.0.self_attn.q_proj"), matches_layer("q_proj", "model.k_proj")
        (True, False)
    """
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _match_patterns(names: Sequence[str], pattern: dict[str, float]) -> dict[str, float]:
    """``{layer: its own density}``, with a warning about keys that match no layer."""
    matches = {key: {name for name in names if matches_layer(key, name)} for key in pattern}
    unused = [key for key, matched in matches.items() if not matched]
    if unused:
        warnings.warn(
            f"density_pattern: no target layer matches {', '.join(map(repr, unused))}; the layers are "
            f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}",
            RuntimeWarning,
            stacklevel=4,
        )
    own = {}
    for name in names:
        for key, density in pattern.items():
            if name in matches[key]:
                own[name] = density
                break
    return own


def _total(budget: Budget, shapes: dict[str, tuple[int, int]], taken: int, caps: Caps | None) -> int:
    """Number of entries that layers share.

    Args:
        budget: of all layers.
        shapes: of the sharing layers.
        taken: entries of the other layers.
        caps: entries that a layer may train at most; None for all.
    """
    numel = sum(rows * cols for rows, cols in shapes.values())
    if budget.density is not None:
        total = round(budget.density * numel)
    elif budget.r is not None:
        per_rank = sum(rows + budget.matrices.get(name, 1) * cols for name, (rows, cols) in shapes.items())
        total = budget.r * per_rank
        if total > numel:
            most = numel // per_rank
            raise ValueError(
                f"r={budget.r}: {total} entries (r * (rows + cols) over {len(shapes)} layers), but the layers have "
                f"{numel} weights; "
                + (f"the largest r that fits is {most}" if most else "not even r=1 fits, use density or num_params")
            )
    else:
        total = (budget.num_params or 0) - taken
        own, left = (f", of which density_pattern takes {taken}", " left") if taken else ("", "")
        if total > numel:
            raise ValueError(
                f"num_params={budget.num_params}{own}: the target layers have {numel} weights{left}; "
                f"at most num_params={numel + taken} is possible"
            )
        if shapes and total < 1:
            raise ValueError(
                f"num_params={budget.num_params}{own}: none are left for the other {len(shapes)} layers; "
                f"at least num_params={taken + len(shapes)} is needed, or lower densities in density_pattern"
            )
    sizes = {name: rows * cols for name, (rows, cols) in shapes.items()} if caps is None else caps
    return max(total, sum(min(budget.at_least, sizes[name]) for name in shapes))


def _global_counts(
    shapes: dict[str, tuple[int, int]], total: int, scores: Callable[[str], Tensor], largest: bool
) -> dict[str, int]:
    """Entries of each layer among the ``total`` best of all; each layer's best entry is always among them."""
    names = list(shapes)
    best = RunningTopK(total, largest)
    sizes = []
    offset = 0
    for name in names:
        flat = scores(name).reshape(-1)
        # the layer's own best first: positions are twice as wide as scores
        positions = topk_indices(flat, min(total, flat.numel()), largest, name=name)
        best.update(flat[positions].float(), positions + offset)
        offset += flat.numel()
        sizes.append(offset)
    keys, values = best.result()
    owner = torch.bucketize(keys, torch.tensor(sizes, device=keys.device), right=True)
    counts = torch.bincount(owner, minlength=len(names))
    missing = counts == 0
    if bool(missing.any()):
        # they replace the lowest ranked entries, but no layer loses its best
        order = values.argsort(descending=largest, stable=True)
        ranked = owner[order]
        first = torch.full_like(counts, keys.numel()).scatter_reduce_(
            0, ranked, torch.arange(ranked.numel(), device=ranked.device), "amin"
        )
        spare = torch.ones_like(ranked, dtype=torch.bool)
        spare[first[~missing]] = False
        given_up = ranked[spare][-int(missing.sum()) :]
        counts = counts - torch.bincount(given_up, minlength=len(names)) + missing
    return dict(zip(names, counts.tolist(), strict=True))


@dataclass(frozen=True)
class Division:
    """A budget applied to layers.

    Attributes:
        shapes: ``{layer name: (rows, cols)}`` of all layers.
        own: ``{layer name: entries}`` of the layers in ``density_pattern``.
        total: entries that the other layers share.
        at_least: minimum entries of each of these layers, or all of its entries.
        caps: maximum of each layer, where it may not train all of its entries.
        matrices: ``{layer name: n}`` of layers whose weight is ``n`` matrices.
    """

    shapes: dict[str, tuple[int, int]]
    own: dict[str, int]
    total: int
    at_least: int
    caps: Caps | None = None
    matrices: Mapping[str, int] = field(default_factory=dict)

    @property
    def sharing(self) -> dict[str, tuple[int, int]]:
        """The layers that share ``total``."""
        return {name: shape for name, shape in self.shapes.items() if name not in self.own}

    def most(self, name: str) -> int:
        """How much a layer may train."""
        rows, cols = self.shapes[name]
        return rows * cols if self.caps is None else self.caps[name]


def check_caps(division: Division, units: str = "entries that are not zero") -> None:
    """Refuse a division of more than the layers may train.

    Args:
        division: of a budget.
        units: what may train, in words.

    Raises:
        ValueError: names the layer, or the total, and what is possible.
    """
    if division.caps is None:
        return
    for name in division.shapes:
        least, most = division.own.get(name, 1), division.most(name)
        if least > most:
            cure = "lower its density in density_pattern" if most else "leave it out with exclude_modules"
            raise ValueError(f"layer {name}: a budget of {least} is more than its {most} {units}; {cure}")
    most = sum(division.most(name) for name in division.sharing)
    if division.total > most:
        entries = sum(rows * cols for rows, cols in division.sharing.values())
        raise ValueError(
            f"a budget of {division.total} is more than the {most} {units} in {len(division.sharing)} layers, "
            f"{most / entries:.4g} of all; lower density, num_params or r"
        )


def divide(shapes: dict[str, tuple[int, int]], budget: Budget, caps: Caps | None = None) -> Division:
    """Apply a budget to layers, as far as their shapes and names determine it.

    Args:
        shapes: ``{layer name: (rows, cols)}`` of the stored weights.
        budget: the number of entries, and how the layers share it.
        caps: entries that a layer may train at most; None for all.

    Raises:
        ValueError: no layers, or a budget that does not fit them.
    """
    if not shapes:
        raise ValueError("no target layers to share the budget between; check target_modules")
    for name, (rows, cols) in shapes.items():
        if rows < 1 or cols < 1:
            raise ValueError(f"layer {name}: a weight of shape {(rows, cols)} has no entries to train; exclude it")
    densities = _match_patterns(list(shapes), budget.density_pattern)
    own = {name: max(1, round(density * math.prod(shapes[name]))) for name, density in densities.items()}
    taken = sum(own.values())
    rest = {name: shape for name, shape in shapes.items() if name not in own}
    if not rest and budget.num_params not in (None, taken):
        raise ValueError(
            f"num_params={budget.num_params}: density_pattern sets every layer, {taken} entries in all; "
            "leave one layer to num_params, or give density instead"
        )
    division = Division(dict(shapes), own, _total(budget, rest, taken, caps), budget.at_least, caps, budget.matrices)
    check_caps(division)
    return division


def allocate(
    division: Division, allocation: str, scores: Callable[[str], Tensor] | None = None, largest: bool = True
) -> dict[str, int]:
    """Number of entries of each layer; arguments as in [`resolve_counts`][sparse_peft.support.resolve_counts].

    Raises:
        ValueError: ``"global"`` without scores.
    """
    rest, total = division.sharing, division.total
    if not rest:
        shared = {}
    elif allocation == "global":
        if scores is None:
            scored = [c.name for c in CRITERIA.values() if not (c.draws or c.decides_count)]
            raise ValueError(f"allocation='global' needs scores to compare; use a selection of {', '.join(scored)}")
        shared = _global_counts(rest, total, scores, largest)
    else:
        caps = [division.most(name) for name in rest]
        weights = {
            "numel": [rows * cols for rows, cols in rest.values()],
            "uniform": [division.matrices.get(name, 1) for name in rest],
            "erk": [rows + division.matrices.get(name, 1) * cols for name, (rows, cols) in rest.items()],
        }
        parts = apportion(weights[allocation], caps, total, division.at_least)
        shared = dict(zip(rest, parts, strict=True))
    if sum(shared.values()) != total:
        raise AssertionError(f"{sum(shared.values())} entries shared instead of {total}; please report this")
    counts = division.own | shared
    return {name: counts[name] for name in division.shapes}


def resolve_counts(
    shapes: dict[str, tuple[int, int]],
    budget: Budget,
    scores: Callable[[str], Tensor] | None = None,
    largest: bool = True,
    caps: Caps | None = None,
) -> dict[str, int]:
    """Number of trained entries of each layer: at least 1, at most all, in sum exactly the budget.

    A budget of fewer entries than layers is raised to one entry per layer.

    Args:
        shapes: ``{layer name: (rows, cols)}`` of the stored weights.
        budget: the number of entries, and how the layers share it.
        scores: for ``allocation="global"``: ``scores(name)`` returns the layer's scores, of any shape. It is called
            once for each sharing layer, one at a time. Scores of enough candidates suffice.
        largest: whether the largest scores are the best.
        caps: entries that a layer may train at most; None for all.

    Raises:
        ValueError: no layers, a budget larger than the layers, or ``"global"`` without scores.

    Example:
        >>> from sparse_peft.support import Budget, resolve_counts
        >>> resolve_counts({"a": (10, 10), "b": (10, 30)}, Budget(density=0.1))
        {'a': 10, 'b': 30}
    """
    return allocate(divide(shapes, budget, caps), budget.allocation, scores, largest)
