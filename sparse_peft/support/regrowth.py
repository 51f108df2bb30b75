"""Prune and regrow: which of a layer's entries are replaced, and by which positions.

A reselection drops a share of the entries with the smallest trained values and grows as many elsewhere. The methods
differ in how they score the positions that do not train.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..numerics.rng import sample_without_replacement
from ..numerics.topk import topk_indices
from .support import Support


@dataclass(frozen=True)
class Regrowth:
    """One way to choose the positions that start to train.

    Attributes:
        name: as in ``selection=``.
        observes: the data collected during training: ``"gradients"`` of candidates in a window of steps, ``"covers"``
            (one number per row and column, from every step), or ``"nothing"``; ``"weights"`` if an event looks at the
            present weight alone and chooses all positions anew.
        accumulate: default length of the window before an event, in optimizer steps.
        leads: whether the first event follows a first window instead of a whole period.
        replaces_first: share of the random first positions that the first event replaces; None for the schedule's.
        competes: whether entries to be dropped compete with the candidates.
        fills: whether missing candidates are filled up at random.
    """

    name: str
    observes: str
    accumulate: int
    leads: bool = False
    replaces_first: float | None = None
    competes: bool = False
    fills: bool = False


REGROWTHS: dict[str, Regrowth] = {
    regrowth.name: regrowth
    for regrowth in (
        # SpIEL-AG, section 3, https://arxiv.org/abs/2401.16405: accumulated gradients of candidates
        Regrowth("accumulated_gradient", "gradients", 5, leads=True, replaces_first=1.0, competes=True),
        # SpIEL-MA, section 3 of the same paper: products of SM3's row and column accumulators
        Regrowth("momentum", "covers", 5, leads=True, replaces_first=1.0),
        # SET, https://arxiv.org/abs/1707.04780: uniform among the positions that do not train
        Regrowth("set", "nothing", 0),
        # RigL, section 3, https://arxiv.org/abs/1911.11134: the gradient of the step itself
        Regrowth("rigl", "gradients", 1, competes=True, fills=True),
    )
}
"""Ways to choose new positions during training, by name."""


REFRESH = Regrowth("principal", "weights", 0)
"""LIFT's refresh: the criterion on the trained weight (section 3, https://arxiv.org/abs/2506.00772)."""

RANDOM_SCORE = torch.finfo(torch.float32).tiny
"""Score of a random position: below all observed scores, above that of an entry without a gradient."""


@dataclass(frozen=True)
class Candidates:
    """Candidate positions of one layer.

    Attributes:
        positions: ``(candidates,)`` flat, ascending, outside the support.
        scores: ``(candidates,)`` float32; [`RANDOM_SCORE`][sparse_peft.support.RANDOM_SCORE] where a position was
            drawn at random.
        incumbent_scores: ``(entries,)`` scores of the support's own entries, if they compete; otherwise None.
    """

    positions: Tensor
    scores: Tensor
    incumbent_scores: Tensor | None = None


@dataclass(frozen=True)
class Exchange:
    """The result of a reselection for one layer.

    Attributes:
        support: the new positions.
        source: ``(new entries,)`` int64: the old slot of an entry that stays, -1 for a new one.
        drop_threshold: largest absolute value among the dropped entries; None if none was dropped.
        grow_threshold: smallest score among the new entries; None for random positions.
    """

    support: Support
    source: Tensor
    drop_threshold: float | None
    grow_threshold: float | None

    @property
    def replaced(self) -> int:
        """Number of new entries."""
        return int((self.source < 0).sum())


def random_inactive(support: Support, k: int, *, seed: int, name: str) -> Tensor:
    """``k`` uniform positions outside the support, ascending int64; determined by the arguments alone.

    Raises:
        ValueError: fewer than ``k`` positions are outside.

    Example:
        >>> import torch
        >>> from sparse_peft.support import Support, random_inactive
        >>> support = Support((2, 4), torch.tensor([0, 1, 2, 3]))
        >>> random_inactive(support, 4, seed=0, name="layer")
        tensor([4, 5, 6, 7])
    """
    rows, cols = support.shape
    ranks = sample_without_replacement(rows * cols - support.nnz, k, seed=seed, name=name).to(support.device)
    # rank -> position: the rank plus the number of occupied positions with at most as many free ones before them
    free_before = support.indices.long() - torch.arange(support.nnz, device=support.device)
    return ranks + torch.searchsorted(free_before, ranks, right=True)


def exchange_for(support: Support, chosen: Support, deltas: Tensor) -> Exchange:
    """The exchange that leads from one support to another of the same size.

    Args:
        support: the present positions.
        chosen: the new ones.
        deltas: ``(entries,)`` deltas at the present positions.
    """
    stays = support.contains(chosen.indices)
    source = torch.where(stays, support.slots(chosen.indices).clamp(max=support.nnz - 1), -1)
    dropped = deltas.detach()[~chosen.contains(support.indices)].abs()
    return Exchange(chosen, source, float(dropped.amax()) if dropped.numel() else None, None)


def exchange(
    supports: Sequence[Support],
    values: Sequence[Tensor],
    counts: Sequence[int],
    candidates: Sequence[Candidates],
    *,
    together: bool = False,
) -> list[Exchange]:
    """Drop the entries with the smallest absolute values and grow the candidates with the highest scores.

    In each layer, ``counts`` entries may be replaced. With scores of their own they compete with the candidates, and
    the winners among them stay. Otherwise each candidate replaces one entry, the smallest first. Ties go to the
    lowest position.

    Args:
        supports: of the layers.
        values: ``(entries,)`` trained values of each layer.
        counts: entries of each layer that may be replaced.
        candidates: of each layer.
        together: drop and grow by one ranking over all layers. The total number of entries stays the same, and each
            layer keeps at least its largest entry.

    Raises:
        ValueError: values or scores that are NaN.

    Example:
        >>> import torch
        >>> from sparse_peft.support import Candidates, Support, exchange
        >>> support = Support((2, 3), torch.tensor([0, 4]))
        >>> candidates = Candidates(torch.tensor([2, 5]), torch.tensor([0.1, 0.7]))
        >>> (result,) = exchange([support], [torch.tensor([0.01, 2.0])], [1], [candidates])
        >>> result.support.indices.tolist(), result.source.tolist()
        ([4, 5], [1, -1])
    """
    if not together:
        return [
            _exchange([part], [value], count, [candidate], keep_largest=False)[0]
            for part, value, count, candidate in zip(supports, values, counts, candidates, strict=True)
        ]
    return _exchange(supports, values, sum(counts), candidates, keep_largest=True)


def _exchange(
    supports: Sequence[Support],
    values: Sequence[Tensor],
    count: int,
    candidates: Sequence[Candidates],
    keep_largest: bool,
) -> list[Exchange]:
    device = supports[0].device
    sizes = [value.numel() for value in values]
    name = supports[0].name if len(supports) == 1 else ""
    magnitude = torch.cat([value.detach().abs().to(device, torch.float32) for value in values])
    if keep_largest:
        # an empty layer could never grow again; infinite magnitudes are never dropped
        starts = torch.tensor([0, *sizes[:-1]]).cumsum(0).tolist()
        for start, size in zip(starts, sizes, strict=True):
            magnitude[start + int(magnitude[start : start + size].argmax())] = torch.inf
        count = min(count, magnitude.numel() - len(sizes))
    scores = torch.cat([candidate.scores.to(device, torch.float32) for candidate in candidates])
    incumbents = [one.incumbent_scores for one in candidates if one.incumbent_scores is not None]
    competes = len(incumbents) == len(candidates)
    if not competes:
        count = min(count, scores.numel())
    dropped = topk_indices(magnitude, count, largest=False, name=name)
    if competes:
        own = torch.cat([score.to(device, torch.float32) for score in incumbents])
        grown, stays = _compete(scores, own[dropped], _ranks(supports, candidates, dropped, sizes), count, name)
        dropped = dropped[~stays]
    else:
        grown = topk_indices(scores, count, name=name)
    parts = zip(
        supports,
        _mask(dropped, magnitude.numel(), device).split(sizes),
        magnitude.split(sizes),
        candidates,
        _mask(grown, scores.numel(), device).split([candidate.scores.numel() for candidate in candidates]),
        strict=True,
    )
    return [
        _assemble(support, gone, size, candidate, new.nonzero().squeeze(1))
        for support, gone, size, candidate, new in parts
    ]


def _mask(positions: Tensor, size: int, device: torch.device) -> Tensor:
    """``(size,)`` bool, true at the positions."""
    mask = torch.zeros(size, dtype=torch.bool, device=device)
    mask[positions] = True
    return mask


def _ranks(
    supports: Sequence[Support], candidates: Sequence[Candidates], dropped: Tensor, sizes: list[int]
) -> tuple[Tensor, Tensor]:
    """Keys of the candidates and of the dropped entries, ordered by (layer, position)."""
    offset, keys, own = 0, [], []
    for support, candidate in zip(supports, candidates, strict=True):
        keys.append(candidate.positions.to(support.device, torch.int64) + offset)
        own.append(support.indices.long() + offset)
        offset += support.shape[0] * support.shape[1]
    return torch.cat(keys), torch.cat(own)[dropped]


def _compete(scores: Tensor, own: Tensor, keys: tuple[Tensor, Tensor], count: int, name: str) -> tuple[Tensor, Tensor]:
    """The ``count`` best of candidates and incumbents: ``(winning candidates, whether each incumbent won)``."""
    order = torch.cat(keys).argsort()
    best = order[topk_indices(torch.cat((scores, own))[order], count, name=name)]
    stays = torch.zeros(own.numel(), dtype=torch.bool, device=own.device)
    stays[best[best >= scores.numel()] - scores.numel()] = True
    return best[best < scores.numel()], stays


def _assemble(support: Support, gone: Tensor, magnitude: Tensor, candidate: Candidates, new: Tensor) -> Exchange:
    """The exchange of one layer, which drops the entries ``gone`` and grows the candidates ``new``."""
    gone, new = gone.to(support.device), new.to(support.device)
    kept = (~gone).nonzero().squeeze(1)
    grown = candidate.positions.to(support.device, support.indices.dtype)[new]
    positions, order = torch.cat((support.indices[kept], grown)).sort()
    source = torch.cat((kept, torch.full_like(new, -1)))[order]
    lowest = float(candidate.scores[new].amin()) if new.numel() else 0.0
    return Exchange(
        Support(support.shape, positions, validate=False, name=support.name),
        source,
        float(magnitude.to(support.device)[gone].amax()) if bool(gone.any()) else None,
        lowest if lowest > RANDOM_SCORE else None,
    )
