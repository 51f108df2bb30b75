"""Records of SoRA's ranks, and their plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from ...dynamics.records import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class LayerRanks:
    """One layer's ranks.

    Attributes:
        alive: ranks with a gate that is not zero.
        size: ranks that it has.
        initial: ranks that it began with; the others were cut out.
    """

    alive: int
    size: int
    initial: int


@dataclass(frozen=True)
class Ranks(Record, event="ranks", plural="reports of ranks"):
    """Number of ranks with a gate that is not zero.

    Attributes:
        step: number of optimizer steps completed.
        adapter: the adapter's name.
        penalty: weight of the gates' norm in that step.
        layers: ``{layer name: its ranks}``.
    """

    plot_name: ClassVar[str | None] = "ranks.png"
    plot_caption: ClassVar[str] = "How many ranks were left"
    plot_size: ClassVar[tuple[float, float]] = (8.0, 6.5)

    penalty: float
    layers: dict[str, LayerRanks]

    @property
    def alive(self) -> int:
        """Remaining ranks of all layers."""
        return sum(layer.alive for layer in self.layers.values())

    @property
    def initial(self) -> int:
        """Ranks that all layers began with."""
        return sum(layer.initial for layer in self.layers.values())

    def logs(self) -> dict[str, float]:
        return {
            "sparsity/rank": float(self.alive),
            "sparsity/rank_share": self.alive / self.initial,
            "sparsity/layers_without_rank": float(sum(layer.alive == 0 for layer in self.layers.values())),
            "sparsity/penalty": self.penalty,
        }

    @classmethod
    def draw(cls, history: Sequence[Self], figure: Figure) -> None:
        """Draw the remaining ranks in the course of a training, and each layer's at its end."""
        course, layers = figure.subplots(2, 1)
        _draw_course(course, history)
        _draw_layers(layers, history[-1])


def _draw_course(axis: Axes, history: Sequence[Ranks]) -> None:
    steps, last = [record.step for record in history], history[-1]
    axis.plot(steps, [record.alive for record in history], "o-", label="ranks left")
    axis.axhline(last.initial, color="k", ls="--", lw=1, label="at the start")
    axis.set_ylim(bottom=0)
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("ranks of all layers")
    axis.set_title(f"Ranks of adapter {last.adapter!r}", fontsize=10)
    penalty = axis.twinx()
    penalty.plot(steps, [record.penalty for record in history], "C1:", label="penalty")
    penalty.set_ylabel("penalty")
    penalty.set_ylim(bottom=0)
    handles = [artist for each in (axis, penalty) for artist in each.get_legend_handles_labels()[0]]
    axis.legend(handles, [str(handle.get_label()) for handle in handles], fontsize=8)


def _draw_layers(axis: Axes, last: Ranks) -> None:
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in last.layers))
    for number, kind in enumerate(kinds):
        alive = [ranks.alive for name, ranks in last.layers.items() if name.rpartition(".")[2] == kind]
        spread = [(i - (len(alive) - 1) / 2) / len(alive) * 0.8 for i in range(len(alive))]
        axis.bar([number + x for x in spread], alive, width=0.8 / len(alive))
    axis.set_xticks(range(len(kinds)), kinds, fontsize=8)
    axis.set_ylim(0, max(1, *(ranks.initial for ranks in last.layers.values())))
    axis.set_ylabel("ranks left")
    title = f"Each layer after step {last.step}, first block to last; the axis ends where the largest began"
    axis.set_title(title, fontsize=9)
