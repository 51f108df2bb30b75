"""Records of masks that change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...dynamics.records import Record


@dataclass(frozen=True)
class LayerMaskChange:
    """One layer's mask.

    Attributes:
        kept: weights that stay.
        flipped: weights that changed sides since the last choice.
        numel: size of the weight.
    """

    kept: int
    flipped: int
    numel: int


@dataclass(frozen=True)
class MaskChange(Record, event="mask", plural="mask changes"):
    """Masks were chosen anew.

    Attributes:
        step: number of optimizer steps completed when it happened.
        adapter: the adapter's name.
        density: share of the weights that stay.
        flipped: share of the weights that changed sides since the last choice. It falls where training settles.
        beta: what passes the mask's zeros from now on.
        masked_norm: norm of the masked weights, as a share of that of all weights.
        mean_density: share of the weights in use, mean over the steps so far.
        layers: ``{layer name: its mask}``.
    """

    plot_name: ClassVar[str | None] = "masks.png"
    plot_caption: ClassVar[str] = "Weights that stay, and masks that change"

    density: float
    flipped: float
    beta: float
    masked_norm: float
    mean_density: float
    layers: dict[str, LayerMaskChange]
