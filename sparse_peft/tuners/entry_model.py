"""What the tuners of methods that train single entries share: budgets shared out, positions chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..support import Budget, Caps, Support, resolve_block_counts, resolve_counts, whole_blocks
from .base_model import BaseSparseModel, StatePlan
from .combination import Tensors
from .delta import SparseDelta
from .entry_config import EntryConfig
from .support_recipe import SupportRecipe
from .targets import Targets, base_of, check_shapes, dense_weight, experts_of, in_dim_of, stored_shape


@dataclass(frozen=True)
class DeltaPlan:
    """How one layer's sparse delta is made: arguments of ``SparseDelta``."""

    shape: tuple[int, int]
    entries: int
    recipe: SupportRecipe
    support: Support | None
    scale: float

    def make_delta(self, name: str) -> SparseDelta:
        return SparseDelta(self.shape, self.entries, name, self.recipe, self.support, self.scale)


def budget_of(config: EntryConfig, targets: Targets) -> Budget:
    """The budget of a config, in which each expert counts as a layer."""
    return of_experts(config.budget(), targets)


def of_experts(budget: Budget, targets: Targets) -> Budget:
    """The budget in which each expert counts as a layer."""
    experts = {name: count for name, module in targets.items() if (count := experts_of(module)) > 1}
    return replace(budget, matrices=experts)


EntryConfigT = TypeVar("EntryConfigT", bound=EntryConfig)
SparseDeltaT = TypeVar("SparseDeltaT", bound=SparseDelta)


class EntryModel(BaseSparseModel[EntryConfigT, SparseDeltaT]):
    """Base of the tuners of single entries."""

    def plan_layers(
        self,
        config: EntryConfigT,
        targets: Targets,
        adapter_name: str,
        file_entries: dict[str, int] | None,
    ) -> Mapping[str, StatePlan]:
        return self.plan_entries(config, targets, adapter_name, file_entries)

    def plan_entries(
        self, config: EntryConfigT, targets: Targets, adapter_name: str, file_entries: dict[str, int] | None
    ) -> dict[str, DeltaPlan]:
        """The plan of each layer's entries; the arguments are those of ``plan_layers``."""
        shapes = {name: stored_shape(module) for name, module in targets.items()}
        counts, supports = self.first_sizes(
            config,
            targets,
            adapter_name,
            in_file=file_entries,
            recorded="num_entries",
            choose=lambda: self._resolve(config, targets, shapes),
        )
        check_shapes(config, shapes)
        self._check_counts(config, shapes, counts)
        config.num_entries = counts
        config.weight_shapes = {name: list(shape) for name, shape in shapes.items()}
        config.resolve_scale(sum(counts.values()))
        return {
            name: DeltaPlan(
                shape,
                counts[name],
                self._recipe(config, name, counts[name], targets[name]),
                supports.get(name),
                config.value_scale,
            )
            for name, shape in shapes.items()
        }

    @classmethod
    def layer_options(cls, config: EntryConfigT) -> dict[str, Any]:
        return {"resident": config.resident}

    @classmethod
    def _recipe(cls, config: EntryConfigT, name: str, entries: int, target: nn.Module | None = None) -> SupportRecipe:
        criterion, lines = config.criterion.name, None
        # an embedding's inputs are its rows, of which a batch looks up few
        if target is not None and config.columns is not None and not isinstance(base_of(target), nn.Embedding):
            lines = in_dim_of(target), config.columns
        return SupportRecipe(criterion, entries, config.seed, name, config.criterion_options, config.block, lines)

    @classmethod
    def resolve_sizes(cls, config: EntryConfigT, model: nn.Module) -> None:
        if config.supports:
            return  # which have the sizes
        targets = cls.checked_targets(config, model)
        shapes = {name: stored_shape(module) for name, module in targets.items()}
        config.num_entries = cls._count(config, targets, shapes)

    @classmethod
    def _count(cls, config: EntryConfigT, targets: Targets, shapes: dict[str, tuple[int, int]]) -> dict[str, int]:
        """Share the budget between the layers."""
        criterion = config.criterion
        recipes = {name: cls._recipe(config, name, 0) for name in targets}
        if criterion.decides_count:
            return {
                name: criterion.count(dense_weight(module), **recipes[name].options)
                for name, module in targets.items()
            }
        scores, caps = None, cls._caps(config, targets)
        if criterion.needs == "weight" and not criterion.draws:

            def scores(name: str) -> Tensor:
                return criterion.score(dense_weight(targets[name]), None, **recipes[name].options)

        budget = budget_of(config, targets)
        if config.block is None:
            return resolve_counts(shapes, budget, scores, criterion.largest, caps)
        return resolve_block_counts(shapes, budget, config.block, scores, criterion.largest, caps)

    @classmethod
    def _caps(cls, config: EntryConfigT, targets: Targets) -> Caps | None:
        """How many entries, or blocks, of each layer may train; None for all."""
        if not config.criterion.restricts:
            return None
        return {name: cls._cap(config, name, dense_weight(module)) for name, module in targets.items()}

    @classmethod
    def _cap(cls, config: EntryConfigT, name: str, weight: Tensor) -> int:
        if weight.device.type == "meta":
            raise ValueError(
                f"layer {name}: selection={config.criterion.name!r} counts the entries that may train, and the weight "
                "is on the meta device; load the model's weights first"
            )
        eligible = config.criterion.eligible(weight)
        if eligible is None:
            return weight.numel()
        return int((eligible if config.block is None else whole_blocks(eligible, config.block)).sum())

    @classmethod
    def _resolve(
        cls, config: EntryConfigT, targets: Targets, shapes: dict[str, tuple[int, int]]
    ) -> tuple[dict[str, int], dict[str, Support]]:
        """Share the budget between the layers and choose their positions, from the weights alone."""
        criterion = config.criterion
        counts = cls._count(config, targets, shapes)
        supports = {}
        for name, module in targets.items():
            if criterion.needs == "none" or base_of(module).weight.device.type != "meta":
                recipe = cls._recipe(config, name, counts[name], module)
                with torch.no_grad():
                    supports[name] = recipe.draw(partial(dense_weight, module), shapes[name])
        return counts, supports

    @classmethod
    def _check_counts(cls, config: EntryConfigT, shapes: dict[str, tuple[int, int]], counts: dict[str, int]) -> None:
        # where a criterion decides by itself how many train, that may be none in some layers
        least = 0 if config.criterion.decides_count else 1
        if least == 0 and not any(counts.values()):
            raise ValueError(
                f"selection={config.criterion.name!r} with {config.criterion_options} finds no entry in any layer, "
                f"neither in layer {next(iter(shapes))} nor in {len(shapes) - 1} others; loosen it"
            )
        for name, (rows, cols) in shapes.items():
            if not least <= counts[name] <= rows * cols:
                raise ValueError(
                    f"num_entries: {counts[name]} entries for layer {name} of {rows} x {cols} weights; "
                    f"between {least} and {rows * cols} are possible"
                )

    @classmethod
    def combined_fields(cls, configs: Sequence[EntryConfigT], tensors: Tensors) -> dict[str, Any]:
        counts = {name: found["values"].numel() for name, found in tensors.items()}
        budget: dict[str, Any] = dict.fromkeys(configs[0].budget_fields)
        budget |= {"num_params": sum(counts.values()), "density_pattern": {}, "allocation": "numel"}
        configs[0].divide_by_scale_(tensors)
        return {**budget, "threshold": None, "num_entries": counts}
