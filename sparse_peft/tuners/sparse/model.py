"""The tuner of sparse deltas."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...ops import CONVOLUTIONS, panel_bytes
from ...support import (
    Support,
    collect_supports,
    resolve_block_counts,
    resolve_counts,
    supports_from_gradients,
)
from ..base_layer import SparseTunerLayer
from ..base_model import BaseSparseModel, LayerPlan, base_of, stored_shape
from ..delta import SparseDelta
from ..selection import SupportRecipe
from .config import SparseConfig
from .layer import SparseLinear


def dense_weight(module: nn.Module) -> Tensor:
    """The base weight of a target in floats, as the matrix that is stored."""
    if isinstance(module, SparseTunerLayer):
        return module.dense_base_weight()
    base = base_of(module)
    backend = resolve_quantization_backend(base)
    return base.weight.detach().reshape(stored_shape(module)) if backend is None else backend.get_base_weight(base)


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
        self._check_shapes(config, shapes, counts)
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

    def _cloned_supports(
        self, config: SparseConfig, targets: dict[str, nn.Module], adapter_name: str
    ) -> dict[str, Support]:
        """TRL adds its reference adapter with the policy's own config object: it trains the policy's positions."""
        twins = [name for name, other in self.peft_config.items() if other is config and name != adapter_name]
        supports = {}
        for name, module in targets.items():
            if isinstance(module, SparseTunerLayer) and twins and twins[0] in module.deltas:
                supports[name] = module.support(twins[0])
        return supports if len(supports) == len(targets) else {}

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
    def _check_names(config: SparseConfig, given: set[str], targets: set[str], what: str) -> None:
        if given != targets:
            missing, extra = sorted(targets - given), sorted(given - targets)
            raise ValueError(
                f"{what} other layers than the config targets in this model: missing {missing[:3]}, not in the model "
                f"{extra[:3]} (and {max(0, len(missing) - 3) + max(0, len(extra) - 3)} more). Use the base model the "
                "adapter was made for, or a new SparseConfig for a new adapter."
            )

    @staticmethod
    def _check_shapes(config: SparseConfig, shapes: dict[str, tuple[int, int]], counts: dict[str, int]) -> None:
        for name, shape in shapes.items():
            made_for = (config.weight_shapes or {}).get(name)
            if made_for is not None and tuple(made_for) != shape:
                raise ValueError(
                    f"weight_shapes: the adapter was made for a weight of shape {tuple(made_for)} in layer {name}, "
                    f"this model's is {shape}; load it on the base model it was made for "
                    f"({config.base_model_name_or_path or 'see its adapter_config.json'})"
                )
            if not 0 < counts[name] <= shape[0] * shape[1]:
                raise ValueError(
                    f"num_entries: {counts[name]} entries for layer {name} of {shape[0]} x {shape[1]} weights; "
                    f"between 1 and {shape[0] * shape[1]} are possible"
                )

    @classmethod
    def _fit(cls, config: SparseConfig, delta: SparseDelta, values: Tensor) -> None:
        if config.redistribute and 0 < values.numel() <= delta.shape[0] * delta.shape[1]:
            delta.resize(values.numel())
            config.num_entries = {**(config.num_entries or {}), delta.name: values.numel()}

    @classmethod
    def select_support(
        cls,
        model: nn.Module,
        config: SparseConfig,
        data: Iterable | None,
        *,
        gradients: dict[str, Tensor] | None = None,
        loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
        oversample: float = 8.0,
    ) -> SparseConfig:
        """See :func:`sparse_peft.select_support`, which copies the config first."""
        criterion = config.criterion
        if criterion.needs not in ("gradient", "activation"):
            raise ValueError(
                f"selection={config.selection!r} needs no data; pass the config to get_peft_model as it is"
            )
        if (data is None) == (gradients is None):
            raise ValueError("select_support needs either data (batches) or gradients={name: tensor}, and not both")
        if config.target_modules is None:
            model_type = BaseTuner.get_model_config(model).get("model_type")
            config.target_modules = cls.target_module_mapping.get(model_type)
            if config.target_modules is None:
                raise ValueError(f"target_modules: none given, and none is known for model type {model_type!r}")
        targets = cls.find_targets(config, model)
        if not targets:
            raise ValueError(f"target_modules={config.target_modules!r} match no layer of {type(model).__name__}")
        cls.check_targets(model, targets)
        for name, module in targets.items():
            if type(base_of(module)) in CONVOLUTIONS:
                raise TypeError(
                    f"Target module {name} of type {type(base_of(module)).__name__}: selection={config.selection!r} "
                    "looks at data for linear layers only; leave convolutions out with exclude_modules, or choose a "
                    "selection that needs no data"
                )
        common = {
            "weight_of": dense_weight,
            "in_dim_of": lambda module: 0 if isinstance(base_of(module), Conv1D) else 1,
            "block": config.block,
        }
        if gradients is not None:
            supports = supports_from_gradients(targets, criterion, config.budget(), gradients, **common)
        else:
            supports = collect_supports(
                model,
                targets,
                criterion,
                config.budget(),
                data,
                loss_fn=loss_fn,
                oversample=oversample,
                panel_bytes=panel_bytes(),
                **common,
            )
        config.supports = supports  # not a field: positions are saved with the adapter's values, not in its config
        return config
