"""The tuner of SLTrain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import pad

from ..base_layer import TunerLayer
from ..combination import Tensors
from ..entry_model import DeltaPlan
from ..expert_weights import ExpertWeight
from ..experts import is_named
from ..low_rank import check_rank, factor_sizes, skeleton_of_factors
from ..sparse.model import SparseModel
from ..targets import Targets, base_of, in_dim_of, stored_shape
from .config import SLTrainConfig
from .delta import SLTrainDelta
from .layer import SLTrainExperts, SLTrainLinear


@dataclass(frozen=True)
class SLTrainPlan:
    """What one layer's new adapter will be."""

    sparse: DeltaPlan
    sizes: tuple[int, int]
    config: SLTrainConfig

    def make_delta(self, name: str) -> SLTrainDelta:
        plan = self.sparse
        return SLTrainDelta(plan.shape, plan.entries, name, plan.recipe, plan.support, self.sizes, self.config)


class SLTrainModel(SparseModel[SLTrainConfig, SLTrainDelta]):
    """Creates a model with sparse plus low rank beside the weights of its target layers, or in their place.

    SLTrain, https://arxiv.org/abs/2406.02214. A layer's state has ``values`` ``(k,)`` with their positions, ``A``
    ``(r, in)`` and ``B`` ``(out, r)``.

    Args:
        model (torch.nn.Module): the model to adapt; of mode ``"pretrain"`` the target layers lose their weights.
        peft_config (sparse_peft.SLTrainConfig): the adapter's config.
        adapter_name: the adapter's name.

    Raises:
        TypeError: a target is no layer that the method trains, or has another method's adapter.
        ValueError: there is no target, a target shares its weight, or a field contradicts the model.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from sparse_peft import SLTrainConfig
        >>> base = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> model = get_peft_model(base, SLTrainConfig(r=4, density=0.02, target_modules=["0"]))
        >>> state = model.base_model.model[0].deltas["default"]
        >>> state.rank, state.support.nnz
        (4, 41)
    """

    layer_cls = SLTrainLinear
    embedding_cls = None
    takes_groups = False

    @classmethod
    def layer_class_of(cls, target: nn.Module) -> type[TunerLayer[Any]]:
        return SLTrainExperts if isinstance(base_of(target), ExpertWeight) else cls.layer_cls

    @classmethod
    def layer_options(cls, config: SLTrainConfig) -> dict[str, Any]:
        return {"resident": config.resident, "weightless": config.mode == "pretrain", "backend": config.backend}

    def check_configs(self) -> None:
        if self._pretrains and len(self.configs) > 1:
            raise ValueError(
                "mode='pretrain' takes the place of the layers' weights, so such a model has one adapter and no "
                "other; merge_and_unload() first to fine-tune it with another"
            )

    def plan_layers(
        self,
        config: SLTrainConfig,
        targets: Targets,
        adapter_name: str,
        file_entries: dict[str, int] | None,
    ) -> dict[str, SLTrainPlan | DeltaPlan]:
        # experts in a file have no module of experts around them
        linear = {
            name: module
            for name, module in targets.items()
            if not (isinstance(base_of(module), ExpertWeight) or is_named(config.target_parameters, name))
        }
        for name, module in linear.items():
            base = base_of(module)
            if config.mode == "pretrain" and type(base) is not nn.Linear:
                raise TypeError(
                    f"Target module {name} of type {type(base).__name__}: mode='pretrain' puts sparse plus low rank "
                    "in place of plain `torch.nn.Linear` layers; leave this one out with exclude_modules, or use "
                    "mode='finetune'"
                )
            check_rank(name, config.rank, stored_shape(module), "r")
        plans = self.plan_entries(config, targets, adapter_name, file_entries)
        sizes = {name: factor_sizes(plans[name].shape, in_dim_of(module)) for name, module in linear.items()}
        with_factors = {name: SLTrainPlan(plans[name], sizes[name], config) for name in linear}
        return {name: with_factors.get(name, plans[name]) for name in targets}

    @classmethod
    def combined_fields(cls, configs: Sequence[SLTrainConfig], tensors: Tensors) -> dict[str, Any]:
        # the scales are in B now; one rank is for all layers, so smaller ones are padded
        with_factors = [found for found in tensors.values() if "A" in found]
        rank = max((found["A"].shape[0] for found in with_factors), default=configs[0].rank)
        for found in with_factors:
            more = rank - found["A"].shape[0]
            found["A"], found["B"] = pad(found["A"], (0, 0, 0, more)), pad(found["B"], (0, more))
        fields = super().combined_fields(configs, tensors)
        return {**fields, "r": rank, "alpha": rank, "doped": None, "trainable_scale": False}

    @classmethod
    def skeleton_layer(
        cls, config: SLTrainConfig, name: str, shape: tuple[int, int], tensors: Mapping[str, Tensor]
    ) -> nn.Module:
        if is_named(config.target_parameters, name):
            return super().skeleton_layer(config, name, shape, tensors)
        return skeleton_of_factors(name, shape, tensors, config.rank)

    # ------------------------------------------------------------------ pretraining

    @property
    def _pretrains(self) -> bool:
        return any(config.mode == "pretrain" for config in self.configs.values())

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        super()._mark_only_adapters_as_trainable(model)
        if self._pretrains and not any(config.inference_mode for config in self.configs.values()):
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    parameter.requires_grad = True

    def unload(self) -> nn.Module:
        """As PEFT's; not in mode ``"pretrain"``."""
        if self._pretrains:
            raise RuntimeError(
                "unload() of mode='pretrain' would leave layers without weights; merge_and_unload() gives them their "
                "dense ones"
            )
        return super().unload()

    @classmethod
    def saves_base_weights(cls, config: SLTrainConfig) -> bool:
        return config.mode == "pretrain"  # without a base model the file needs all parameters

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        entries = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        if cls.saves_base_weights(config):
            unwanted = tuple(f".{name}" for name in unwanted_adapter_names)
            seen: set[tuple[int, int]] = set()
            for key, tensor in state_dict.items():
                where = tensor.data_ptr(), tensor.numel()
                if f".{cls.prefix}" in key or key.endswith(unwanted) or where in seen:
                    continue  # tied weights once
                seen.add(where)
                entries[key] = tensor
        return entries
