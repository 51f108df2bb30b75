"""What sparsity buys at an equal number of parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from ...constraints import Count, Limits, OneOf, validated

KINDS = ("doped", "factorized", "wide", "parallel")
"""Transformations of Sparse-IFT (section 3, https://arxiv.org/abs/2303.11525)."""
Sparsity = Annotated[float, Limits(least=0, below=1, noun="a share of zeros")]
# so that 8 / (1 - 0.9) is 80 ranks and not 79
SLACK = 1e-9


@dataclass(frozen=True)
class IsoBudget:
    """A sparse replacement of a dense weight or of LoRA's factors.

    Attributes:
        kind: of the transformation.
        dense: parameters of what is replaced.
        entries: parameters in sparse parts, exact.
        rank: of the low-rank part (``"doped"``) or of sparse factors (``"factorized"``); None without.
        width: ``(outputs, inputs)`` of a wide weight; None without.
        branches: number of parallel weights, with equally many entries each.
        low_rank: parameters in a dense low-rank part.

    Example:
        >>> from sparse_peft import IsoBudget
        >>> IsoBudget("doped", dense=768, entries=192, rank=6, low_rank=576).parameters
        768
    """

    kind: str
    dense: int
    entries: int
    rank: int | None = None
    width: tuple[int, int] | None = None
    branches: int = 1
    low_rank: int = 0

    @property
    def parameters(self) -> int:
        """All parameters, at most ``dense``."""
        return self.entries + self.low_rank


def iso_budget(kind: str, shape: tuple[int, int], sparsity: float, r: int | None = None) -> IsoBudget:
    """Sizes of a sparse replacement with at most the parameters of the dense original.

    Sparse-IFT, https://arxiv.org/abs/2303.11525, section 3. With ``n`` parameters and sparsity ``s``: ``"wide"`` has
    both sides ``1 / sqrt(1 - s)`` times as wide, ``"parallel"`` has ``1 / (1 - s)`` branches, ``"factorized"`` two
    sparse factors of rank ``n / ((1 - s) (out + in))``, and ``"doped"`` a dense low rank of ``s n / (out + in)``
    beside a sparse weight. Ranks, widths and branches are rounded down, and counts are those of the rounded sizes.

    Equal parameters are equal operations only where products with sparse weights are computed sparsely. With masks
    on dense weights all but ``"doped"`` cost more time than the original.

    Args:
        kind: one of ``KINDS``.
        shape: ``(outputs, inputs)`` of the weight.
        sparsity: ``s``, in [0, 1).
        r: replace LoRA of this rank, ``r * (out + in)`` parameters, instead of the weight; for ``"doped"`` and
            ``"factorized"``, which [`SLTrainConfig`][sparse_peft.SLTrainConfig] (``doped=``) and
            [`SparseIFTConfig`][sparse_peft.SparseIFTConfig] train.

    Raises:
        ValueError, TypeError: an unknown kind, a field out of range, or ``r`` with a kind that changes the model.

    Example:
        >>> from sparse_peft import iso_budget
        >>> iso_budget("factorized", (64, 32), sparsity=0.75, r=8).rank
        32
        >>> iso_budget("doped", (64, 32), sparsity=0.75, r=8).parameters == 8 * (64 + 32)
        True
    """
    validated("kind", kind, Annotated[str, OneOf(KINDS)])
    outputs, inputs = validated("shape", shape, list[Count])
    validated("sparsity", sparsity, Sparsity)
    if r is None:
        dense = outputs * inputs
    elif kind in ("wide", "parallel"):
        raise ValueError(
            f"r={r} with kind={kind!r}: it widens the model's own layers; for LoRA's factors use 'factorized' or "
            "'doped'"
        )
    else:
        dense = validated("r", r, Count) * (outputs + inputs)
    kept, sides = 1 - sparsity, outputs + inputs
    if kind == "wide":
        factor = 1 / math.sqrt(kept)
        width = math.floor(outputs * factor + SLACK), math.floor(inputs * factor + SLACK)
        return IsoBudget(kind, dense, min(dense, math.floor(kept * width[0] * width[1] + SLACK)), width=width)
    if kind == "parallel":
        branches = math.floor(1 / kept + SLACK)
        return IsoBudget(kind, dense, dense // branches * branches, branches=branches)
    if kind == "factorized":
        return IsoBudget(kind, dense, dense, rank=math.floor(dense / (kept * sides) + SLACK))
    rank = math.floor(sparsity * dense / sides + SLACK)
    return IsoBudget(kind, dense, dense - rank * sides, rank=rank, low_rank=rank * sides)
