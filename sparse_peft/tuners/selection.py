"""Choosing the trained positions of a model's layers beforehand, from data."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, cast

import torch
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType
from torch import Tensor, distributed, nn

from ..ops import is_convolution
from ..support import Support
from .base_config import BaseSparseConfig
from .base_model import BaseSparseModel
from .base_state import TrainedState
from .four_bit import prepare_four_bit
from .targets import Targets, base_of, check_names, stored_shape
from .traversal import modules_beside_adapters

Config = TypeVar("Config", bound=BaseSparseConfig)


def select_support(
    model: nn.Module,
    config: Config,
    data: Iterable[Any] | None = None,
    *,
    gradients: dict[str, Tensor] | None = None,
    supports: Mapping[str, Support | Tensor] | None = None,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    oversample: float = 8.0,
) -> Config:
    """Choose the trained positions of every target layer before the adapter is made: from data, or by hand.

    Data are passed once, and no dense gradient of more than one layer is alive at a time. With several batches the
    first one proposes ``oversample`` times the budget and all of them are summed at those candidates only;
    ``oversample=float("inf")`` sums everything.

    Each of fused experts is looked at by itself, over the tokens routed to it. Experts that no token reached train an
    equal share of their parameter's entries at random positions; a warning names them.

    In a distributed run all processes call it, and all get what process 0 chose from its data.

    Args:
        model: the base model, without adapters.
        config: a [`SparseConfig`][sparse_peft.SparseConfig] or [`S2FTConfig`][sparse_peft.S2FTConfig] with a
            data-driven ``selection``; a [`SparseConfig`][sparse_peft.SparseConfig] or
            [`SLTrainConfig`][sparse_peft.SLTrainConfig] with ``selection="given"``.
        data: batches, each passed to the model as ``model(**batch).loss``, or to ``loss_fn``.
        gradients: instead of data, ``{layer or parameter name: gradient of its weight}``.
        supports: with ``selection="given"``, ``{layer or parameter name: positions}`` of all targets: a
            [`Support`][sparse_peft.support.Support], a bool mask of the weight's shape, or flat row-major positions in
            any order. Without ``target_modules`` these layers are the targets.
        loss_fn: ``loss_fn(model, batch) -> scalar``.
        oversample: candidates kept per trained entry while later batches are summed.

    Returns:
        A copy of ``config`` that carries the positions; pass it to ``get_peft_model`` or a trainer's ``peft_config``.

    Raises:
        ValueError: not exactly one source given, a layer no batch reached, a bad budget, or positions of other layers
            or shapes than the targets'.

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
    _check_sources(config, data, gradients, supports)
    chosen = copy.copy(config)
    if supports is not None and chosen.target_modules is None and not chosen.names_experts:
        chosen.target_modules = [name.removesuffix(".weight") for name in supports]
    tuner = cast("type[BaseSparseModel[Config, TrainedState]]", PEFT_TYPE_TO_TUNER_MAPPING[PeftType[config.method]])
    targets = tuner.checked_targets(chosen, model)
    found: Mapping[str, Support]
    if supports is not None:
        found = _given(chosen, targets, supports)
    else:
        _check_linear(chosen, targets)
        prepare_four_bit(modules_beside_adapters(model))
        found = tuner.choose_from_data(model, chosen, targets, data, gradients, loss_fn=loss_fn, oversample=oversample)
    if distributed.is_available() and distributed.is_initialized():
        # every process saw data of its own; they must train the same positions
        from_first = [{name: support.to("cpu") for name, support in found.items()}]
        distributed.broadcast_object_list(from_first, src=0)
        found = from_first[0]
    chosen.supports = found
    return chosen


def _check_sources(config: BaseSparseConfig, data: Any, gradients: Any, supports: Any) -> None:
    """Refuse a selection that needs something else than what is there."""
    selection, needs = getattr(config, "selection", "none"), config.selection_needs
    wanted = ("supports",) if needs == "positions" else ("data", "gradients")
    if needs in ("none", "weight"):
        raise ValueError(
            f"selection={selection!r} needs no data; pass the {type(config).__name__} to get_peft_model as it is, or "
            "positions of your own with selection='given'"
        )
    sources = {"data": data, "gradients": gradients, "supports": supports}
    given = [name for name, source in sources.items() if source is not None]
    if len(given) != 1 or given[0] not in wanted:
        raise ValueError(
            f"selection={selection!r}: select_support needs {' or '.join(wanted)}, and one source only; given are "
            f"{', '.join(given) or 'none'}"
        )


def _given(config: BaseSparseConfig, targets: Targets, supports: Mapping[str, Support | Tensor]) -> dict[str, Support]:
    """The targets' supports, checked, in the targets' order.

    Raises:
        TypeError, ValueError: positions of other layers or shapes, out of range or repeated.
    """
    named = {name if name in targets else name.removesuffix(".weight"): given for name, given in supports.items()}
    check_names(config, set(named), set(targets), "supports are for")
    return {name: _support_of(name, module, named[name]) for name, module in targets.items()}


def _support_of(name: str, module: nn.Module, given: Support | Tensor) -> Support:
    shape = stored_shape(module)
    if isinstance(given, Support):
        if given.shape != shape:
            raise ValueError(f"layer {name}: a support of shape {given.shape}, where the stored weight is {shape}")
        return Support(shape, given.indices, validate=False, name=name)
    if given.dtype != torch.bool:
        return Support.from_indices(shape, given, name=name)
    own = tuple(base_of(module).weight.shape)
    if tuple(given.shape) not in (shape, own):
        raise ValueError(f"layer {name}: a mask of shape {tuple(given.shape)}, where the stored weight is {own}")
    return Support.from_mask(given.reshape(shape), name)


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
