"""One adapter per task, on entries that no other task has: what was learnt cannot be overwritten."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from peft import PeftModel, get_peft_model
from torch import nn

from ..support import Support, random_inactive
from ..tuners.delta_layer import SparseTunerLayer
from ..tuners.entry_config import EntryConfig
from ..tuners.traversal import tuner_layers


@dataclass(frozen=True)
class Capacity:
    """Entries of one layer.

    Attributes:
        weights: of the layer.
        used: ``{task: its entries}``.
    """

    weights: int
    used: dict[str, int]

    @property
    def free(self) -> int:
        """Entries that no task has."""
        return self.weights - sum(self.used.values())


class TaskSupports:
    """Adapters of tasks that come one after the other, each on random entries that no earlier task has.

    This is parameter isolation, as in continual learning with dynamic sparse training: entries of earlier tasks are
    frozen, and a task computes afterwards what it computed before, bit for bit. With ``share`` a task reads what
    earlier tasks have learnt, their adapters being active and frozen; without it each starts from the base alone.

    The model keeps everything: save it as usual, and pass the loaded model to continue.

    Args:
        model: a base model, or a ``PeftModel`` whose adapters are the earlier tasks', in their order.
        config: of each task's adapter: a budget, an allocation and the target modules.
            [`SparseConfig`][sparse_peft.SparseConfig] with random positions.
        share: whether later tasks compute with the adapters of earlier ones.

    Attributes:
        model: the ``PeftModel``; None before the first task.
        tasks: names of the tasks, oldest first.

    Raises:
        ValueError: a config whose positions are not random and fixed.

    Example:
        >>> import torch
        >>> from sparse_peft import SparseConfig
        >>> from sparse_peft.adapters import TaskSupports
        >>> base = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> tasks = TaskSupports(base, SparseConfig(density=0.4, target_modules=["0"]))
        >>> model = tasks.add("first")  # train it
        >>> model = tasks.add("second")
        >>> tasks.capacity()["0"].free
        410
    """

    def __init__(self, model: nn.Module, config: EntryConfig, share: bool = True):
        if getattr(config, "selection", "random") != "random" or config.block is not None:
            raise ValueError(
                f"selection={getattr(config, 'selection', None)!r}: tasks get random entries among those that are "
                "free; use selection='random' with granularity='entry'"
            )
        self.config, self.share = config, share
        self.model: Any = model if isinstance(model, PeftModel) else None
        self._base = model
        earlier: dict[str, Any] = {} if self.model is None else self.model.peft_config
        self.tasks = list(earlier)
        self._sizes: dict[str, int] = dict(earlier[self.tasks[0]].num_entries) if self.tasks else {}

    def add(self, task: str) -> PeftModel:
        """Add a task's adapter, which is active afterwards and the only one that trains.

        Make the optimizer after this.

        Raises:
            ValueError: a name that exists, or fewer free entries in a layer than a task gets.
        """
        if task in self.tasks:
            raise ValueError(f"task={task!r}: there is one already; the tasks are {', '.join(self.tasks)}")
        if self.model is None:
            first = replace(self.config)
            self.model = get_peft_model(self._base, first, adapter_name=task)
            self._sizes = dict(first.num_entries or {})
        else:
            self.model.add_adapter(task, self._next(task))
        self.tasks.append(task)
        self.activate(task, train=True)
        model: PeftModel = self.model
        return model

    def activate(self, task: str, train: bool = False) -> None:
        """Compute with a task's adapter and, if they share, with those of the tasks before it.

        Args:
            task: its name.
            train: whether its adapter trains; the others never do.

        Raises:
            ValueError: there is no such task.
        """
        if task not in self.tasks:
            raise ValueError(f"task={task!r}: the tasks are {', '.join(self.tasks) or 'none yet'}")
        before = self.tasks[: self.tasks.index(task)] if self.share else []
        self.model.set_adapter(task)
        self.model.base_model.set_adapter([*before, task])
        for layer in self._layers().values():
            for name, state in layer.deltas.items():
                state.requires_grad_(train and name == task)

    def capacity(self) -> dict[str, Capacity]:
        """``{layer name: its entries}``: how many are left for further tasks."""
        return {
            name: Capacity(
                layer.stored_shape[0] * layer.stored_shape[1], {t: entries_of(layer, t) for t in self.tasks}
            )
            for name, layer in self._layers().items()
        }

    def _layers(self) -> Mapping[str, SparseTunerLayer[Any]]:
        if self.model is None:
            return {}
        return {layer.name: layer for layer in tuner_layers(self.model) if isinstance(layer, SparseTunerLayer)}

    def _next(self, task: str) -> Any:
        """A config with random positions among the free ones."""
        supports = {}
        for name, layer in self._layers().items():
            taken, _ = Support.union(*(layer.support(other).to("cpu") for other in self.tasks))
            size, free = self._sizes[name], taken.shape[0] * taken.shape[1] - taken.nnz
            if size > free:
                raise ValueError(
                    f"layer {name}: task {task!r} gets {size} entries and {free} are free after {len(self.tasks)} "
                    "tasks; use a lower density, or another layer-wise allocation"
                )
            drawn = random_inactive(taken, size, seed=self.config.seed, name=f"{name}, task {task}")
            supports[name] = Support(taken.shape, drawn, validate=False, name=name)
        fields: dict[str, Any] = dict.fromkeys((*self.config.budget_fields, *self.config.resolved_fields))
        given: Any = replace(cast("Any", self.config), selection="given", density_pattern={}, **fields)
        given.supports = supports
        return given


def entries_of(layer: SparseTunerLayer[Any], task: str) -> int:
    """Number of a task's entries in a layer."""
    return layer.support(task).nnz if task in layer.deltas else 0
