"""What the tuners of methods that train single entries share: budgets shared out, positions chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..support import Support, resolve_block_counts, resolve_counts
from .base_model import BaseSparseModel, StatePlan
from .combination import Tensors
from .delta import SparseDelta
from .entry_config import EntryConfig
from .support_recipe import SupportRecipe
from .targets import Targets, base_of, check_shapes, dense_weight, stored_shape


@dataclass(frozen=True)
class DeltaPlan:
    """How one layer's sparse delta is made: arguments of ``SparseDelta``."""

    shape: tuple[int, int]
    entries: int
    recipe: SupportRecipe
    support: Support | None

    def make_delta(self, name: str) -> SparseDelta:
        return SparseDelta(self.shape, self.entries, name, self.recipe, self.support)


class EntryModel(BaseSparseModel):
    """Base of the tuners of single entries."""

    def plan_layers(
        self,
        config: EntryConfig,
        targets: Targets,
        adapter_name: str,
        file_entries: dict[str, int] | None,
    ) -> Mapping[str, StatePlan]:
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
        return {
            name: DeltaPlan(shape, counts[name], self._recipe(config, name, counts[name]), supports.get(name))
            for name, shape in shapes.items()
        }

    @staticmethod
    def layer_options(config: EntryConfig) -> dict[str, Any]:
        return {"resident": config.resident}

    @staticmethod
    def _recipe(config: EntryConfig, name: str, entries: int) -> SupportRecipe:
        criterion = config.criterion.name
        return SupportRecipe(criterion, entries, config.seed, name, config.criterion_options, config.block)

    @classmethod
    def resolve_sizes(cls, config: EntryConfig, model: nn.Module) -> None:
        targets = cls.checked_targets(config, model)
        shapes = {name: stored_shape(module) for name, module in targets.items()}
        config.num_entries = cls._count(config, targets, shapes)

    @classmethod
    def _count(cls, config: EntryConfig, targets: Targets, shapes: dict[str, tuple[int, int]]) -> dict[str, int]:
        """Share the budget between the layers."""
        criterion = config.criterion
        recipes = {name: cls._recipe(config, name, 0) for name in targets}
        if criterion.decides_count:
            return {
                name: criterion.count(dense_weight(module), **recipes[name].options)
                for name, module in targets.items()
            }
        scores = None
        if criterion.needs == "weight":

            def scores(name: str) -> Tensor:
                return criterion.score(dense_weight(targets[name]), None, **recipes[name].options)

        if config.block is None:
            return resolve_counts(shapes, config.budget(), scores, criterion.largest)
        return resolve_block_counts(shapes, config.budget(), config.block, scores, criterion.largest)

    @classmethod
    def _resolve(
        cls, config: EntryConfig, targets: Targets, shapes: dict[str, tuple[int, int]]
    ) -> tuple[dict[str, int], dict[str, Support]]:
        """Share the budget between the layers and choose their positions, from the weights alone."""
        criterion = config.criterion
        counts = cls._count(config, targets, shapes)
        supports = {}
        for name, module in targets.items():
            if criterion.needs == "none" or base_of(module).weight.device.type != "meta":
                recipe = cls._recipe(config, name, counts[name])
                with torch.no_grad():
                    supports[name] = recipe.draw(lambda module=module: dense_weight(module), shapes[name])
        return counts, supports

    @staticmethod
    def _check_counts(config: EntryConfig, shapes: dict[str, tuple[int, int]], counts: dict[str, int]) -> None:
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
    def combined_fields(cls, configs: Sequence[EntryConfig], tensors: Tensors) -> dict[str, Any]:
        counts = {name: found["values"].numel() for name, found in tensors.items()}
        budget = {"density": None, "num_params": sum(counts.values()), "density_pattern": {}, "allocation": "numel"}
        if "r" in configs[0].budget_fields:
            budget["r"] = None
        return {**budget, "threshold": None, "num_entries": counts}
