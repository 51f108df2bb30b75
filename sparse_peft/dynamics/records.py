"""What happened in training besides steps: for the log, for plots, and kept in checkpoints."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

# Ages are counted in reselection periods: entries younger than 1, 2, 4 and 8 of them, and the rest.
AGE_EDGES = (1, 2, 4, 8)


@dataclass(frozen=True)
class LayerChange:
    """One layer's part in a reselection.

    Attributes:
        entries: trained entries afterwards.
        replaced: entries that are new.
        numel: size of the weight.
        drop_threshold: largest absolute value among the dropped entries; None if none was dropped.
        grow_threshold: smallest score among the new entries; None if none is new, or growth was random.
    """

    entries: int
    replaced: int
    numel: int
    drop_threshold: float | None = None
    grow_threshold: float | None = None


@dataclass(frozen=True)
class Reselection:
    """One prune-and-regrow event of one adapter.

    Attributes:
        step: number of optimizer steps completed when it happened.
        adapter: the adapter's name.
        rate: share of each layer's entries that was up for replacement.
        layers: ``{layer name: what happened there}``.
        age_edges: ages in optimizer steps that separate the bins of ``ages``.
        ages: ``len(age_edges) + 1`` numbers of entries by age, all layers together, youngest first.
    """

    step: int
    adapter: str
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
        """Numbers for a Trainer's log, each under ``sparsity/``."""
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

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts."""
        return {"event": "reselection", **asdict(self), "age_edges": list(self.age_edges), "ages": list(self.ages)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Reselection:
        """What ``to_dict`` gave."""
        layers = {name: LayerChange(**change) for name, change in data["layers"].items()}
        fields = {name: value for name, value in data.items() if name != "event"}
        return cls(**{**fields, "layers": layers, "age_edges": tuple(data["age_edges"]), "ages": tuple(data["ages"])})


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
class Freezing:
    """Entries that have grown out of the smallest stopped training.

    Attributes:
        step: number of optimizer steps completed when it happened.
        adapter: the adapter's name.
        layers: ``{layer name: what happened there}``.
    """

    step: int
    adapter: str
    layers: dict[str, LayerFreezing]

    @property
    def frozen(self) -> int:
        """Entries of all layers that do not train any more."""
        return sum(layer.frozen for layer in self.layers.values())

    def logs(self) -> dict[str, float]:
        """Numbers for a Trainer's log, each under ``sparsity/``."""
        entries = sum(layer.entries for layer in self.layers.values())
        numel = sum(layer.numel for layer in self.layers.values())
        return {
            "sparsity/frozen": float(self.frozen),
            "sparsity/frozen_share": self.frozen / entries,
            "sparsity/density": (entries - self.frozen) / numel,
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts."""
        return {"event": "freezing", **asdict(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Freezing:
        """What ``to_dict`` gave."""
        layers = {name: LayerFreezing(**change) for name, change in data["layers"].items()}
        return cls(data["step"], data["adapter"], layers)


@dataclass(frozen=True)
class LayerRanks:
    """One layer's ranks.

    Attributes:
        alive: ranks that its gate lets through.
        size: ranks that it has.
        initial: ranks that it began with; those that are not there any more were cut out.
    """

    alive: int
    size: int
    initial: int


@dataclass(frozen=True)
class Ranks:
    """How many ranks the gates let through.

    Attributes:
        step: number of optimizer steps completed.
        adapter: the adapter's name.
        penalty: weight of the gates' norm in that step.
        layers: ``{layer name: its ranks}``.
    """

    step: int
    adapter: str
    penalty: float
    layers: dict[str, LayerRanks]

    @property
    def alive(self) -> int:
        """Ranks of all layers that are left."""
        return sum(layer.alive for layer in self.layers.values())

    @property
    def initial(self) -> int:
        """Ranks that all layers began with."""
        return sum(layer.initial for layer in self.layers.values())

    def logs(self) -> dict[str, float]:
        """Numbers for a Trainer's log, each under ``sparsity/``."""
        return {
            "sparsity/rank": float(self.alive),
            "sparsity/rank_share": self.alive / self.initial,
            "sparsity/layers_without_rank": float(sum(layer.alive == 0 for layer in self.layers.values())),
            "sparsity/penalty": self.penalty,
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts."""
        return {"event": "ranks", **asdict(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Ranks:
        """What ``to_dict`` gave."""
        layers = {name: LayerRanks(**ranks) for name, ranks in data["layers"].items()}
        return cls(data["step"], data["adapter"], data["penalty"], layers)


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
class Allocation:
    """Entries were shared among the layers anew.

    Attributes:
        step: number of optimizer steps completed when it happened.
        adapter: the adapter's name.
        budget: entries of all layers together.
        layers: ``{layer name: what it got}``.
    """

    step: int
    adapter: str
    budget: int
    layers: dict[str, LayerAllocation]

    @property
    def density(self) -> float:
        """Share of the layers' entries that are kept."""
        return self.budget / sum(layer.numel for layer in self.layers.values())

    def logs(self) -> dict[str, float]:
        """Numbers for a Trainer's log, each under ``sparsity/``."""
        densities = [layer.entries / layer.numel for layer in self.layers.values()]
        return {
            "sparsity/density": self.density,
            "sparsity/lowest_layer_density": min(densities),
            "sparsity/highest_layer_density": max(densities),
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts."""
        return {"event": "allocation", **asdict(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Allocation:
        """What ``to_dict`` gave."""
        layers = {name: LayerAllocation(**layer) for name, layer in data["layers"].items()}
        return cls(data["step"], data["adapter"], data["budget"], layers)


Record = Reselection | Freezing | Ranks | Allocation
_EVENTS = {"reselection": Reselection, "freezing": Freezing, "ranks": Ranks, "allocation": Allocation}


def record_from_dict(data: dict[str, Any]) -> Record:
    """The record that ``to_dict`` gave this.

    Raises:
        KeyError, TypeError: it is of no known event, or not complete.
    """
    return _EVENTS[data["event"]].from_dict(data)
