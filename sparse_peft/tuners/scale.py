"""The scale at which LoRA's learning rate suits a sparse delta.

AdamW moves every trained number by about the learning rate in a step. The update of a delta is then a matrix of equal
absolute values at its entries, and its spectral norm is compared with that of LoRA's (r=16, alpha=32, new factors);
``docs/learning_rate.md`` has the derivation and the measurements.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

LORA_RATE = 2e-4
"""The learning rate, with AdamW, that scales are made for."""
LORA_RANK, LORA_SCALE = 16, 2.0
# A step of more than about 0.01 is as large as a weight.
LARGEST = 64.0

Spread = Literal["flat", "channels", "peaked"]
"""How an update looks at the trained entries: scattered signs, signs in whole channels, or one direction."""


def lora_norm(width: float, spread: Spread) -> float:
    """Spectral norm of LoRA's first update, in learning rates, on a square weight.

    ``A`` is drawn uniformly within ``1 / sqrt(width)``, with singular values of about ``1 / sqrt(3)``. The update of
    ``B`` ``(width, r)`` is a matrix of signs: with a norm of ``sqrt(width)`` where they are independent,
    ``sqrt(width * r)`` where they are one direction.

    Args:
        width: of the weight.
        spread: ``"flat"``: the geometric mean of both; otherwise one direction. Of channels that is measured, not
            derived: they need twice as much.
    """
    directions = math.sqrt(LORA_RANK) if spread == "flat" else LORA_RANK
    return LORA_SCALE / math.sqrt(3) * math.sqrt(width * directions)


def delta_norm(width: float, entries: float, spread: Spread) -> float:
    """Spectral norm of a sparse delta's first update, in learning rates, at scale 1 on a square weight.

    Args:
        width: of the weight.
        entries: that train.
        spread: ``"flat"``: independent signs at scattered entries, ``2 * sqrt(entries / width)``; ``"channels"``: in
            ``entries / width`` channels, ``sqrt(width) + sqrt(entries / width)``; ``"peaked"``: one direction,
            ``sqrt(entries)``, the most that is possible.
    """
    if spread == "peaked":
        return math.sqrt(entries)
    along = math.sqrt(entries / width)
    return 2 * along if spread == "flat" else math.sqrt(width) + along


def matched_scale(entries: int, shapes: Iterable[Sequence[int]], spread: Spread) -> float:
    """The power of two, up to ``LARGEST``, that comes closest to LoRA's update, for all layers together.

    Args:
        entries: trained entries of all layers.
        shapes: ``(rows, cols)`` of the layers' weights.
        spread: how updates look at the entries.

    Example:
        >>> matched_scale(41943, [(2048, 2048)], "flat")  # 1 % of one weight
        16.0
    """
    sizes = [math.prod(shape) for shape in shapes]
    if not entries:
        return 1.0
    width = math.sqrt(sum(sizes) / len(sizes))
    ratio = lora_norm(width, spread) / delta_norm(width, entries / len(sizes), spread)
    return min(LARGEST, 2.0 ** round(math.log2(ratio)))
