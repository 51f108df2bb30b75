"""Records of SNELLA's allocation, and their plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from ...dynamics.records import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class LayerAllocation:
    """One layer's part in an allocation.

    Attributes:
        entries: entries that are kept from now on.
        numel: size of the weight.
        score: the layer's share of all layers' scores.
    """

    entries: int
    numel: int
    score: float


@dataclass(frozen=True)
class Allocation(Record, event="allocation"):
    """Entries were shared among the layers anew.

    Attributes:
        step: number of optimizer steps completed when it happened.
        adapter: the adapter's name.
        budget: entries of all layers together.
        layers: ``{layer name: its share}``.
    """

    plot_name: ClassVar[str | None] = "allocation.png"
    plot_caption: ClassVar[str] = "What share of each layer was kept"

    budget: int
    layers: dict[str, LayerAllocation]

    @property
    def density(self) -> float:
        """Share of the layers' entries that are kept."""
        return self.budget / sum(layer.numel for layer in self.layers.values())

    def logs(self) -> dict[str, float]:
        densities = [layer.entries / layer.numel for layer in self.layers.values()]
        return {
            "sparsity/density": self.density,
            "sparsity/lowest_layer_density": min(densities),
            "sparsity/highest_layer_density": max(densities),
        }

    @classmethod
    def draw(cls, history: Sequence[Self], figure: Figure) -> None:
        """Draw the share of each layer's entries that is kept in the course of training, and all layers' together."""
        steps, last = [record.step for record in history], history[-1]
        kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in last.layers))
        axis = figure.subplots()
        for name in last.layers:
            kind = name.rpartition(".")[2]
            shares = [100 * record.layers[name].entries / record.layers[name].numel for record in history]
            first = name == next(other for other in last.layers if other.rpartition(".")[2] == kind)
            axis.plot(steps, shares, f"C{kinds.index(kind)}.-", lw=0.8, ms=3, label=kind if first else None)
        axis.plot(steps, [100 * record.density for record in history], "k--", lw=1.5, label="all layers")
        axis.set_ylim(0, 102)
        axis.set_xlabel("optimizer step")
        axis.set_ylabel("% of a layer's entries")
        axis.set_title(f"Entries kept by adapter {last.adapter!r}, a line for each layer", fontsize=10)
        axis.legend(fontsize=8)
