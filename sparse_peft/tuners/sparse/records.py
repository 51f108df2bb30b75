"""Records of reselections, and their plot."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import quantiles
from typing import TYPE_CHECKING, ClassVar, Self

from ...dynamics.records import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Ages are counted in reselection periods: entries younger than 1, 2, 4 and 8 of them, and older ones.
AGE_EDGES = (1, 2, 4, 8)


@dataclass(frozen=True)
class LayerChange:
    """One layer's part in a reselection.

    Attributes:
        entries: trained entries afterwards.
        replaced: entries that are new.
        numel: size of the weight.
        drop_threshold: largest absolute delta among the dropped entries; None if none was dropped.
        grow_threshold: smallest score among the new entries; None if none is new, or growth was random.
    """

    entries: int
    replaced: int
    numel: int
    drop_threshold: float | None = None
    grow_threshold: float | None = None


@dataclass(frozen=True)
class Reselection(Record, event="reselection"):
    """One prune-and-regrow event of one adapter.

    Attributes:
        step: number of optimizer steps completed when it happened.
        adapter: the adapter's name.
        rate: share of each layer's entries that was up for replacement.
        layers: ``{layer name: what happened there}``.
        age_edges: ages in optimizer steps that separate the bins of ``ages``.
        ages: ``len(age_edges) + 1`` numbers of entries by age, all layers together, youngest first.
    """

    plot_name: ClassVar[str | None] = "turnover.png"
    plot_caption: ClassVar[str] = "What each reselection replaced"
    plot_size: ClassVar[tuple[float, float]] = (7.5, 8.0)

    rate: float
    layers: dict[str, LayerChange]
    age_edges: tuple[int, ...] = ()
    ages: tuple[int, ...] = ()

    @property
    def entries(self) -> int:
        """Trained entries of all layers."""
        return sum(layer.entries for layer in self.layers.values())

    @property
    def replaced(self) -> int:
        """New entries of all layers."""
        return sum(layer.replaced for layer in self.layers.values())

    @property
    def density(self) -> float:
        """Share of the layers' weights that trains."""
        return self.entries / sum(layer.numel for layer in self.layers.values())

    @property
    def overlap(self) -> float:
        """Share of the entries that were in the previous support too."""
        return 1 - self.replaced / self.entries

    def logs(self) -> dict[str, float]:
        drop = [layer.drop_threshold for layer in self.layers.values() if layer.drop_threshold is not None]
        grow = [layer.grow_threshold for layer in self.layers.values() if layer.grow_threshold is not None]
        logs = {
            "density": self.density,
            "replaced": self.replaced,
            "replace_rate": self.rate,
            "overlap": self.overlap,
        }
        if drop:
            logs["drop_threshold"] = sum(drop) / len(drop)
        if grow:
            logs["grow_threshold"] = sum(grow) / len(grow)
        if self.ages:
            below = [f"age_below_{edge}" for edge in self.age_edges]
            for name, count in zip([*below, f"age_from_{self.age_edges[-1]}"], self.ages, strict=True):
                logs[name] = count / self.entries
        return {f"sparsity/{name}": float(value) for name, value in logs.items()}

    @classmethod
    def draw(cls, history: Sequence[Self], figure: Figure) -> None:
        """Draw what each reselection replaced, its thresholds, and the entries' ages after it."""
        turnover, thresholds, ages = figure.subplots(3, 1, sharex=True)
        _draw_turnover(turnover, history)
        _draw_thresholds(thresholds, history)
        _draw_ages(ages, history)


def _draw_turnover(axis: Axes, history: Sequence[Reselection]) -> None:
    steps = [record.step for record in history]
    axis.plot(steps, [100 * (1 - record.overlap) for record in history], "o-", label="replaced")
    axis.plot(steps, [100 * record.rate for record in history], "k--", lw=1, label="up for replacement")
    axis.set_ylabel("% of the entries")
    axis.set_title(f"Reselection of adapter {history[0].adapter!r}", fontsize=10)
    axis.legend(fontsize=8)


def _draw_thresholds(axis: Axes, history: Sequence[Reselection]) -> None:
    for what, label in (("drop_threshold", "largest dropped |value|"), ("grow_threshold", "smallest grown score")):
        _draw_band(axis, history, what, label)
    axis.set_ylabel("threshold, median\nand 10-90 % of the layers", fontsize=9)
    if axis.get_legend_handles_labels()[0]:
        axis.set_yscale("log")
        axis.legend(fontsize=8)


def _draw_band(axis: Axes, history: Sequence[Reselection], what: str, label: str) -> None:
    """Draw the median and the outer deciles of one threshold over the layers."""
    rows = []
    for record in history:
        found = sorted(
            value for layer in record.layers.values() if (value := getattr(layer, what)) is not None and value > 0
        )
        if found:
            deciles = quantiles(found, n=10, method="inclusive") if len(found) > 1 else found * 9
            rows.append((record.step, deciles[0], deciles[4], deciles[8]))
    if rows:
        steps, low, middle, high = zip(*rows, strict=True)
        (line,) = axis.plot(steps, middle, "o-", label=label)
        axis.fill_between(steps, low, high, alpha=0.2, color=line.get_color())


def _draw_ages(axis: Axes, history: Sequence[Reselection]) -> None:
    steps, first = [record.step for record in history], history[0]
    shares = [[100 * record.ages[i] / record.entries for record in history] for i in range(len(first.ages))]
    edges = [0, *first.age_edges]
    labels = [f"{a} to {b - 1}" for a, b in itertools.pairwise(edges)] + [f"{edges[-1]} and more"]
    if len(steps) > 1:
        axis.stackplot(steps, shares, labels=labels)
    else:
        bottom = 0.0
        for share, label in zip(shares, labels, strict=True):
            axis.bar(steps, share, bottom=bottom, label=label)
            bottom += share[0]
    axis.set_ylabel("% of the entries")
    axis.set_xlabel("optimizer step")
    axis.legend(title="age in steps", fontsize=7, title_fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
