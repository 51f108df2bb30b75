"""Choosing the trained positions of a model's layers beforehand, from data."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType
from torch import Tensor, distributed, nn

from ..ops import is_convolution
from .base_config import BaseSparseConfig
from .base_model import BaseSparseModel
from .base_state import TrainedState
from .four_bit import prepare_four_bit
from .targets import Targets, base_of
from .traversal import modules_beside_adapters

Config = TypeVar("Config", bound=BaseSparseConfig)


def select_support(
    model: nn.Module,
    config: Config,
    data: Iterable[Any] | None = None,
    *,
    gradients: dict[str, Tensor] | None = None,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    oversample: float = 8.0,
) -> Config:
    """Choose the trained positions of every target layer from data, in one pass, before the adapter is made.

    No dense gradient of more than one layer is alive at a time. With several batches the first one proposes
    ``oversample`` times the budget and all of them are summed at those candidates only; ``oversample=float("inf")``
    sums everything.

    Each of fused experts is looked at by itself, over the tokens routed to it. Experts that no token reached train an
    equal share of their parameter's entries at random positions; a warning names them.

    In a distributed run all processes call it, and all get what process 0 chose from its data.

    Args:
        model: the base model, without adapters.
        config: a [`SparseConfig`][sparse_peft.SparseConfig] or [`S2FTConfig`][sparse_peft.S2FTConfig] with a
            data-driven ``selection``.
        data: batches, each passed to the model as ``model(**batch).loss``, or to ``loss_fn``.
        gradients: instead of data, ``{layer or parameter name: gradient of its weight}``.
        loss_fn: ``loss_fn(model, batch) -> scalar``.
        oversample: candidates kept per trained entry while later batches are summed.

    Returns:
        A copy of ``config`` that carries the positions; pass it to ``get_peft_model`` or a trainer's ``peft_config``.

    Raises:
        ValueError: neither or both of ``data`` and ``gradients`` given, a layer no batch reached, or a bad budget.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from sparse_peft import SparseConfig, select_support
        >>> base = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> config = SparseConfig(selection="fisher", num_params=100, target_modules=["0"])
        >>> batches = [torch.randn(8, 64) for _ in range(2)]
        >>> chosen = select_support(base, config, batches, loss_fn=lambda model, x: model(x).square().mean())
        >>> get_peft_model(base, chosen).base_model.model[0].support("default").nnz
        100
    """
    if config.selection_needs not in ("gradient", "activation"):
        raise ValueError(
            f"selection={getattr(config, 'selection', 'none')!r} needs no data; pass the {type(config).__name__} to "
            "get_peft_model as it is"
        )
    if (data is None) == (gradients is None):
        raise ValueError("select_support needs either data (batches) or gradients={name: tensor}, and not both")
    chosen = copy.copy(config)
    tuner = cast("type[BaseSparseModel[Config, TrainedState]]", PEFT_TYPE_TO_TUNER_MAPPING[PeftType[config.method]])
    targets = tuner.checked_targets(chosen, model)
    _check_linear(chosen, targets)
    prepare_four_bit(modules_beside_adapters(model))
    supports = tuner.choose_from_data(model, chosen, targets, data, gradients, loss_fn=loss_fn, oversample=oversample)
    if distributed.is_available() and distributed.is_initialized():
        # every process saw data of its own; they must train the same positions
        from_first = [{name: support.to("cpu") for name, support in supports.items()}]
        distributed.broadcast_object_list(from_first, src=0)
        supports = from_first[0]
    chosen.supports = supports
    return chosen


def _check_linear(config: BaseSparseConfig, targets: Targets) -> None:
    """Refuse convolutions, which no criterion looks at."""
    for name, module in targets.items():
        if is_convolution(base_of(module)):
            selection = getattr(config, "selection", "none")
            raise TypeError(
                f"Target module {name} of type {type(base_of(module)).__name__}: selection={selection!r} "
                "looks at data for linear layers and fused experts only; leave convolutions out with "
                "exclude_modules, or choose a selection that needs no data"
            )
