"""Records of SaRA's freezing."""

from __future__ import annotations

from dataclasses import dataclass

from ...dynamics.records import Record


@dataclass(frozen=True)
class LayerFreezing:
    """One layer's part in a freezing.

    Attributes:
        entries: entries that trained before.
        frozen: entries that do not train any more.
        numel: size of the weight.
        threshold: absolute value from which on they are frozen.
    """

    entries: int
    frozen: int
    numel: int
    threshold: float


@dataclass(frozen=True)
class Freezing(Record, event="freezing"):
    """Entries that have grown out of the smallest stopped training.

    Attributes:
        step: number of optimizer steps completed when it happened.
        adapter: the adapter's name.
        layers: ``{layer name: what happened there}``.
    """

    layers: dict[str, LayerFreezing]

    @property
    def frozen(self) -> int:
        """Entries of all layers that do not train any more."""
        return sum(layer.frozen for layer in self.layers.values())

    def logs(self) -> dict[str, float]:
        entries = sum(layer.entries for layer in self.layers.values())
        numel = sum(layer.numel for layer in self.layers.values())
        return {
            "sparsity/frozen": float(self.frozen),
            "sparsity/frozen_share": self.frozen / entries,
            "sparsity/density": (entries - self.frozen) / numel,
        }
