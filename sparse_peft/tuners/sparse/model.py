"""The tuner of sparse deltas."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from ...calibrate import ModelPass, collect_supports, supports_from_gradients
from ...support import Support
from ..base_layer import TunerLayer
from ..combination import Tensors
from ..delta import SparseDelta
from ..entry_model import EntryModel, budget_of
from ..targets import Targets, layer_views
from .config import SparseConfig
from .layer import SparseEmbedding, SparseLinear

SparseConfigT = TypeVar("SparseConfigT", bound=SparseConfig)
SparseDeltaT = TypeVar("SparseDeltaT", bound=SparseDelta)


class SparseModel(EntryModel[SparseConfigT, SparseDeltaT]):
    """Creates a model with a sparse delta on its target layers, as in SpIEL (https://arxiv.org/abs/2401.16405).

    A layer's state has ``values`` ``(k,)`` and their flat positions ``indices`` ``(k,)``, ascending.

    Args:
        model (torch.nn.Module): the model to adapt.
        peft_config (sparse_peft.SparseConfig): the adapter's config.
        adapter_name: the adapter's name.

    Raises:
        TypeError: a target is no layer that the method trains, or has another method's adapter.
        ValueError: there is no target, a target shares its weight, or a field contradicts the model.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from sparse_peft import SparseConfig
        >>> base = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> model = get_peft_model(base, SparseConfig(density=0.1, target_modules=["0"]))
        >>> model.base_model.model[0].deltas["default"]
        SparseDelta(entries=205, shape=(32, 64), density=0.1, scale=4)
    """

    layer_cls: ClassVar[type[TunerLayer[Any]]] = SparseLinear
    embedding_cls: ClassVar[type[TunerLayer[Any]] | None] = SparseEmbedding

    @classmethod
    def fit_state(cls, config: SparseConfigT, state: SparseDeltaT, parameters: dict[str, Tensor]) -> None:
        values = parameters.get("values")
        if values is None or not config.redistribute:
            return
        if 0 < values.numel() <= state.shape[0] * state.shape[1]:
            state.resize(values.numel())
            config.num_entries = {**(config.num_entries or {}), state.name: values.numel()}

    @classmethod
    def combined_fields(cls, configs: Sequence[SparseConfigT], tensors: Tensors) -> dict[str, Any]:
        # how positions change goes on holding; how they were chosen does not, nor that they are whole blocks
        first = configs[0]
        selection = first.selection if first.changes_in_training else "random"
        return {**super().combined_fields(configs, tensors), "selection": selection, "granularity": "entry"}

    @classmethod
    def choose_from_data(
        cls,
        model: nn.Module,
        config: SparseConfigT,
        targets: Targets,
        data: Iterable[Any] | None,
        gradients: dict[str, Tensor] | None,
        *,
        loss_fn: Callable[[nn.Module, Any], Tensor] | None,
        oversample: float,
    ) -> dict[str, Support]:
        layers = layer_views(targets, cls._tied_layers(model))
        criterion, budget = config.criterion, budget_of(config, targets)
        if gradients is not None:
            return supports_from_gradients(layers, criterion, budget, gradients, block=config.block, seed=config.seed)
        batches = ModelPass(model, data or (), loss_fn)
        return collect_supports(
            batches, layers, criterion, budget, oversample=oversample, block=config.block, seed=config.seed
        )
