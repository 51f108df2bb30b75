"""The tuner of sparse deltas."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ...ops import panel_bytes
from ...support import (
    Support,
    collect_supports,
    resolve_block_counts,
    resolve_counts,
    supports_from_gradients,
)
from ..base_model import BaseSparseModel, LayerPlan, base_of, dense_weight, in_dim_of, stored_shape
from ..delta import SparseDelta
from ..selection import SupportRecipe
from .config import SparseConfig
from .layer import SparseLinear


class SparseModel(BaseSparseModel):
    """Creates a model with a sparse delta on its target layers.

    Args:
        model: the model to adapt.
        config: a :class:`~sparse_peft.SparseConfig`.
        adapter_name: the adapter's name.

    Example:
        >>> from transformers import AutoModelForCausalLM
        >>> from peft import get_peft_model
        >>> from sparse_peft import SparseConfig
        >>> model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M")
        >>> model = get_peft_model(model, SparseConfig(density=0.01, target_modules="all-linear"))
    """

    prefix = "sparse_peft_delta_"
    tuner_layer_cls = SparseLinear
    layer_cls = SparseLinear

    def plan_layers(
        self,
        config: SparseConfig,
        targets: dict[str, nn.Module],
        adapter_name: str,
        file_entries: dict[str, int] | None,
    ) -> dict[str, LayerPlan]:
        shapes = {name: stored_shape(module) for name, module in targets.items()}
        supports = self._cloned_supports(config, targets, adapter_name) or config.__dict__.get("supports") or {}
        if supports:
            self._check_names(config, set(supports), set(targets), "the positions chosen by select_support are for")
            counts = {name: supports[name].nnz for name in targets}
        elif file_entries is not None:
            counts = {name: file_entries[name] for name in targets}
        elif config.num_entries is not None:
            self._check_names(config, set(config.num_entries), set(targets), "num_entries is for")
            counts = {name: config.num_entries[name] for name in targets}
        else:
            counts, supports = self._resolve(config, targets, shapes)
        self._check_shapes(config, shapes)
        self._check_counts(shapes, counts)
        config.num_entries = counts
        config.weight_shapes = {name: list(shape) for name, shape in shapes.items()}
        return {
            name: LayerPlan(shape, counts[name], self._recipe(config, name, counts[name]), supports.get(name))
            for name, shape in shapes.items()
        }

    @staticmethod
    def _recipe(config: SparseConfig, name: str, entries: int) -> SupportRecipe:
        options = {"principal": {"r": config.principal_rank}, "threshold": {"threshold": config.threshold}}
        criterion = config.criterion.name
        return SupportRecipe(criterion, entries, config.seed, name, options.get(criterion, {}), config.block)

    @classmethod
    def _resolve(
        cls, config: SparseConfig, targets: dict[str, nn.Module], shapes: dict[str, tuple[int, int]]
    ) -> tuple[dict[str, int], dict[str, Support]]:
        """Share the budget between the layers and choose their positions, from the weights alone."""
        criterion = config.criterion
        recipes = {name: cls._recipe(config, name, 0) for name in targets}
        if criterion.count is not None:
            counts = {
                name: criterion.count(dense_weight(module), **recipes[name].options)
                for name, module in targets.items()
            }
        else:
            scores = None
            if criterion.needs == "weight":

                def scores(name: str) -> Tensor:
                    return criterion.score(dense_weight(targets[name]), None, **recipes[name].options)

            if config.block is None:
                counts = resolve_counts(shapes, config.budget(), scores, criterion.largest)
            else:
                counts = resolve_block_counts(shapes, config.budget(), config.block, scores, criterion.largest)
        supports = {}
        for name, module in targets.items():
            if criterion.needs == "none" or base_of(module).weight.device.type != "meta":
                recipe = cls._recipe(config, name, counts[name])
                with torch.no_grad():
                    supports[name] = recipe.draw(lambda module=module: dense_weight(module), shapes[name])
        return counts, supports

    @staticmethod
    def _check_counts(shapes: dict[str, tuple[int, int]], counts: dict[str, int]) -> None:
        for name, (rows, cols) in shapes.items():
            if not 0 < counts[name] <= rows * cols:
                raise ValueError(
                    f"num_entries: {counts[name]} entries for layer {name} of {rows} x {cols} weights; "
                    f"between 1 and {rows * cols} are possible"
                )

    @classmethod
    def _fit(cls, config: SparseConfig, delta: SparseDelta, values: Tensor) -> None:
        if config.redistribute and 0 < values.numel() <= delta.shape[0] * delta.shape[1]:
            delta.resize(values.numel())
            config.num_entries = {**(config.num_entries or {}), delta.name: values.numel()}

    @classmethod
    def choose_from_data(
        cls,
        model: nn.Module,
        config: SparseConfig,
        targets: dict[str, nn.Module],
        data: Iterable | None,
        gradients: dict[str, Tensor] | None,
        *,
        loss_fn: Callable[[nn.Module, Any], Tensor] | None,
        oversample: float,
    ) -> dict[str, Support]:
        common = {
            "weight_of": dense_weight,
            "in_dim_of": in_dim_of,
            "block": config.block,
        }
        arguments = targets, config.criterion, config.budget()
        if gradients is not None:
            return supports_from_gradients(*arguments, gradients, **common)
        return collect_supports(
            model, *arguments, data, loss_fn=loss_fn, oversample=oversample, panel_bytes=panel_bytes(), **common
        )
