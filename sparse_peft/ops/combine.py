"""Combinations of several deltas of one weight, on their supports: weighted sums, TIES, DARE, magnitude pruning.

Pruning, sign election and averaging are PEFT's (``peft.utils.merge_utils``), on values aligned at the union of the
supports. An adapter without an entry at a position counts as zero, as in dense deltas. Only ``density`` differs: it is
a share of an adapter's own entries, which are few of the weight's.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from peft.utils.merge_utils import calculate_majority_sign_mask, disjoint_merge, prune
from torch import Tensor

from ..constraints import Count, OneOf, Share, validate_fields
from ..support import ChannelSupport, Support

ENTRY_COMBINATIONS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
FACTOR_COMBINATIONS = ("linear", "cat", "svd")
COMBINATIONS = tuple(dict.fromkeys(ENTRY_COMBINATIONS + FACTOR_COMBINATIONS))
MAJORITY_SIGN_METHODS = ("total", "frequency")


@dataclass(frozen=True)
class Combination:
    """How the deltas of several adapters become one.

    Args:
        combination_type: ``"linear"``: the weighted sum. ``"ties"`` (https://arxiv.org/abs/2306.01708): the largest
            entries of each adapter; those whose sign agrees with the elected one are averaged over the adapters that
            have them. ``"dare_linear"`` and ``"dare_ties"`` (https://arxiv.org/abs/2311.03099): the same sums after
            dropping random entries and rescaling the others. ``"magnitude_prune"``: the weighted sum of the largest
            entries of each adapter. For low-rank factors, ``"linear"`` and ``"cat"`` concatenate their ranks, which
            is the exact weighted sum, and ``"svd"`` is its best approximation of rank ``svd_rank``.
        density: with pruning: share of each adapter's own entries that is kept, in (0, 1].
        majority_sign_method: with TIES: whether a sign is elected by the sum of values (``"total"``) or by the number
            of adapters (``"frequency"``).
        seed: with DARE: determines the dropped entries, together with the layer's name and the adapter's place; the
            same on every device and in every process.
        svd_rank: with ``"svd"``; by default the largest rank of the adapters.

    Raises:
        ValueError: an unknown type, or a field that does not fit the type or is missing.

    Example:
        >>> from sparse_peft.ops import Combination
        >>> Combination("ties", density=0.5).prunes
        True
    """

    combination_type: Annotated[str, OneOf(COMBINATIONS)] = "linear"
    density: Share | None = None
    majority_sign_method: Annotated[str, OneOf(MAJORITY_SIGN_METHODS)] = "total"
    seed: int = 0
    svd_rank: Count | None = None

    def __post_init__(self) -> None:
        validate_fields(self)
        kind = self.combination_type
        if self.prunes != (self.density is not None):
            raise ValueError(
                f"combination_type={kind!r} with density={self.density!r}: a density, the share of each adapter's "
                "entries that is kept, is given exactly with ties, dare_linear, dare_ties and magnitude_prune"
            )
        if self.svd_rank is not None and kind != "svd":
            raise ValueError(f"svd_rank={self.svd_rank!r} with combination_type={kind!r}: a rank goes with 'svd' only")

    @property
    def prunes(self) -> bool:
        """Whether entries are pruned."""
        return self.combination_type in ("ties", "dare_linear", "dare_ties", "magnitude_prune")

    @property
    def elects_signs(self) -> bool:
        """Whether signs are elected, as in TIES."""
        return self.combination_type in ("ties", "dare_ties")

    @property
    def drops_at_random(self) -> bool:
        """Whether entries are dropped at random, as in DARE."""
        return self.combination_type.startswith("dare")


def check_weights(weights: Sequence[float], count: int) -> None:
    """Check the adapters' weights.

    Raises:
        ValueError: weights that are not one finite number for each adapter.
    """
    if len(weights) != count or not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"weights={list(weights)!r}: one finite number for each of {count} adapters is expected")


def _pruned(values: Tensor, how: Combination, name: str) -> Tensor:
    """One adapter's values ``(entries,)``, with pruned ones set to zero."""
    if how.density is None or how.density == 1:
        return values
    if not how.drops_at_random:
        return prune(values, how.density, method="magnitude")
    with torch.random.fork_rng(devices=[]):
        digest = hashlib.blake2b(f"{how.seed}\0{name}".encode(), digest_size=7).digest()
        torch.default_generator.manual_seed(int.from_bytes(digest, "little"))
        return prune(values, how.density, method="random") / how.density  # older versions of PEFT do not rescale


def combine_on_supports(
    supports: Sequence[Support], values: Sequence[Tensor], weights: Sequence[float], how: Combination, name: str = ""
) -> tuple[Support, Tensor]:
    """The support and the values of the combined delta of one weight.

    Computed in float64 on the CPU and rounded once: the mean of equal adapters is that adapter bit for bit, and the
    order of adapters does not matter.

    Args:
        supports: of each adapter, over the same weight.
        values: ``(entries,)`` of each.
        weights: one number for each.
        how: the combination, one of ``ENTRY_COMBINATIONS``.
        name: the layer's name.

    Returns:
        The union of the supports, and ``(entries,)`` float32 values on the CPU. Pruning also removes entries from a
        union of single entries, but keeps at least one.

    Raises:
        ValueError: supports of weights of other shapes, or a combination that is not defined for entries.
    """
    if how.combination_type not in ENTRY_COMBINATIONS:
        raise ValueError(
            f"combination_type={how.combination_type!r} is for low-rank factors; sparse deltas have "
            f"{', '.join(ENTRY_COMBINATIONS)}"
        )
    supports = [support.to("cpu") for support in supports]
    union, slots = supports[0].union(*supports[1:])
    aligned = torch.zeros(len(supports), union.nnz, dtype=torch.float64)
    for number, (slot, value) in enumerate(zip(slots, values, strict=True)):
        aligned[number, slot] = _pruned(value.detach().cpu().double(), how, f"{number}:{name}")
    weighted = aligned * torch.tensor(weights, dtype=torch.float64)[:, None]
    if how.elects_signs:
        method: Literal["total", "frequency"] = "frequency" if how.majority_sign_method == "frequency" else "total"
        combined = disjoint_merge(weighted, calculate_majority_sign_mask(aligned, method=method))
    else:
        combined = weighted.sum(dim=0)
    if how.prunes and not isinstance(union, ChannelSupport):
        kept = combined.nonzero().squeeze(1)
        kept = torch.zeros(1, dtype=torch.int64) if kept.numel() == 0 and union.nnz else kept
        union, combined = Support(union.shape, union.indices[kept], validate=False, name=name), combined[kept]
    return union, combined.float()


def combine_factors(
    factors: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float], how: Combination, name: str = ""
) -> tuple[Tensor, Tensor]:
    """The weighted sum of low-rank products ``B @ A``, as factors; the product is never formed.

    The factors cannot be averaged separately: the mean of ``B`` times the mean of ``A`` is not the mean of products.

    Args:
        factors: ``(rank, inputs)`` and ``(outputs, rank)`` of each adapter.
        weights: one number for each.
        how: ``"linear"`` or ``"cat"`` concatenate the ranks, which is the exact sum; ``"svd"`` approximates it.
        name: the layer's name.

    Returns:
        ``(rank, inputs)`` and ``(outputs, rank)`` float32 on the CPU.

    Raises:
        ValueError: a combination that is not defined for factors.
    """
    if how.combination_type not in FACTOR_COMBINATIONS:
        raise ValueError(
            f"layer {name}: combination_type={how.combination_type!r} looks at single entries, and low-rank factors "
            "have none: their product has all entries of the weight. Use 'linear' (exact, the ranks add up) or 'svd' "
            "(the best approximation of svd_rank); to merge dense deltas by TIES or DARE, save the adapters with "
            "save_as_lora and use LoRA's add_weighted_adapter with 'ties_svd' or 'dare_ties_svd'"
        )
    down = torch.cat([a.detach().cpu().double() for a, _ in factors])
    up = torch.cat([b.detach().cpu().double() * weight for (_, b), weight in zip(factors, weights, strict=True)], 1)
    if how.combination_type == "svd":
        rank = how.svd_rank or max(a.shape[0] for a, _ in factors)
        down, up = _best_factors(down, up, rank)
    return down.float(), up.float()


def _best_factors(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best rank-``rank`` approximation of ``up @ down``, by a singular value decomposition of its small core."""
    right, right_core = torch.linalg.qr(down.t())
    left, left_core = torch.linalg.qr(up)
    u, s, vh = torch.linalg.svd(left_core @ right_core.t(), full_matrices=False)
    return vh[:rank] @ right.t(), left @ (u[:, :rank] * s[:rank])
