"""Fused experts: weights of mixture-of-experts layers that are bare parameters of their block, and no layers.

transformers keeps them as one parameter ``(experts, rows, cols)`` each. PEFT finds none of them by
``target_modules``: a name that means a linear layer in other models would be passed over.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from .base_config import BaseSparseConfig

CURE = "name linear layers in target_modules, or take all there are with target_modules='all-linear'"
BARE_WEIGHTS = (
    "bare parameters, such as fused experts, are no modules; name them in target_parameters or take all experts with "
    f"target_experts=True, where the method trains experts; else {CURE}"
)

QUANTISED = (
    "quantised experts have no entries to train. Load them in bfloat16 (MXFP4: "
    "quantization_config=Mxfp4Config(dequantize=True)), or leave experts out"
)


def bare_weights(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """``{name: shape}`` of the parameters of three dimensions that no layer has as its ``weight``."""
    return {
        name.replace(".base_layer.", "."): tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3 and name.rpartition(".")[2] not in ("weight", "bias")
    }


def check_bare_weights(config: BaseSparseConfig, model: nn.Module, targets: Collection[str]) -> None:
    """Say that a name in ``target_modules`` is a bare parameter, where it is one that does not train.

    Args:
        config: the new adapter's.
        model: the base.
        targets: names of its target layers.

    Raises:
        ValueError: the targets match bare parameters and nothing else, or those of a module of which other parameters
            train; all experts are asked for, and there are none.
    """
    found = bare_weights(model)
    _check_there_are_experts(config, model, found, targets)
    named = {name: shape for name, shape in found.items() if is_named(config.target_modules, name)}
    named = {name: shape for name, shape in named.items() if name not in targets}
    if not named:
        return
    first, shape = next(iter(named.items()))
    block = first.rpartition(".")[0]
    message = (
        f"target_modules={config.target_modules!r}: {first} is a parameter of shape {shape} in "
        f"{type(model.get_submodule(block)).__name__} and no layer, like {len(named) - 1} others; {BARE_WEIGHTS}"
    )
    mixed = [name for name in targets if name in found and name.rpartition(".")[0] == block]
    if mixed and not _names_any(config.target_modules, first, targets):
        raise ValueError(
            f"target_modules={config.target_modules!r} names {first}, and target_parameters "
            f"{mixed[0]} of the same module: a module's parameters belong into one of the fields. Name both in "
            "target_parameters"
        )
    if not targets:
        raise ValueError(message)
    warnings.warn(f"{message}. The adapter leaves them out.", UserWarning, stacklevel=2)


def _check_there_are_experts(
    config: BaseSparseConfig, model: nn.Module, found: Collection[str], targets: Collection[str]
) -> None:
    if not config.target_experts or any(name in found for name in targets):
        return
    left = " that exclude_modules, modules_to_save and layers_to_transform leave in" if found else ""
    message = f"target_experts=True: {type(model).__name__} has no fused experts{left}"
    if not targets:
        raise ValueError(f"{message}; {CURE}")
    warnings.warn(f"{message}. The adapter trains layers only.", UserWarning, stacklevel=2)


def _names_any(target_modules: Collection[str] | str | None, parameter: str, targets: Collection[str]) -> bool:
    """Whether what names a parameter names any of the targets as well."""
    if isinstance(target_modules, str):
        return any(is_named(target_modules, name) for name in targets)
    names = [name for name in target_modules or () if is_named([name], parameter)]
    return any(is_named(names, name) for name in targets)


def check_target_parameters(config: BaseSparseConfig, model: nn.Module) -> None:
    """Refuse names in ``target_parameters`` that are no experts' parameters.

    Raises:
        ValueError: names the field, the name and the parameter.
    """
    shapes = {
        name.replace(".base_layer.", "."): tuple(parameter.shape)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    for target in config.target_parameters or ():
        named = [name for name in shapes if is_named([target], name)]
        if not named:
            raise ValueError(_matches_nothing(target, bare_weights(model), model))
        for name in named:
            if len(shapes[name]) != 3 or name.rpartition(".")[2] in ("weight", "bias"):
                owner = type(model.get_submodule(name.rpartition(".")[0])).__name__
                raise ValueError(
                    f"target_parameters: {target!r} names {name} of shape {shapes[name]} in {owner}, and experts' "
                    "parameters are bare ones of shape (experts, rows, cols); name layers in target_modules, and what "
                    "is to train whole in modules_to_save"
                )
            if "." not in name:
                raise ValueError(
                    f"target_parameters: {name} is a parameter of the model itself, which cannot be replaced by a "
                    "layer; wrap the model in a module of its own"
                )


def _matches_nothing(target: str, bare: dict[str, tuple[int, ...]], model: nn.Module) -> str:
    known = sorted({".".join(name.split(".")[-2:]) for name in bare})
    there = f"its experts' parameters end in {', '.join(known)}" if known else f"it has no fused experts; {CURE}"
    return f"target_parameters: {target!r} matches no parameter of {type(model).__name__}; {there}"


def is_named(targets: Iterable[str] | None, name: str) -> bool:
    """Whether a full name is among names, suffixes of names or a regular expression."""
    if targets is None or targets == "all-linear":
        return False
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)
