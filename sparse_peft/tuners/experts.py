"""Fused experts: weights of mixture-of-experts layers that are bare parameters of their block, and no layers.

transformers keeps them as one parameter ``(experts, rows, cols)`` each. No method trains such a parameter yet, and
PEFT finds none of them by ``target_modules``: a name that means a linear layer in other models would be passed over.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from .base_config import BaseSparseConfig

BARE_WEIGHTS = (
    "bare parameters, such as fused experts, cannot be trained sparsely yet; name linear layers in target_modules, or "
    "take all there are with target_modules='all-linear'"
)


def bare_weights(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """``{name: shape}`` of the parameters of three dimensions that no layer has as its ``weight``."""
    return {
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3 and name.rpartition(".")[2] not in ("weight", "bias")
    }


def check_bare_weights(config: BaseSparseConfig, model: nn.Module, found: bool) -> None:
    """Say that a target is a bare parameter, where it is one.

    Args:
        config: the new adapter's.
        model: the base.
        found: whether its targets match any layer.

    Raises:
        ValueError: the targets match bare parameters and nothing else.
    """
    named = {name: shape for name, shape in bare_weights(model).items() if _is_named(config.target_modules, name)}
    if not named:
        return
    first, shape = next(iter(named.items()))
    block = first.rpartition(".")[0]
    message = (
        f"target_modules={config.target_modules!r}: {first} is a parameter of shape {shape} in "
        f"{type(model.get_submodule(block)).__name__} and no layer, like {len(named) - 1} others; {BARE_WEIGHTS}"
    )
    if not found:
        raise ValueError(message)
    warnings.warn(f"{message}. The adapter leaves them out.", UserWarning, stacklevel=2)


def _is_named(targets: Iterable[str] | None, name: str) -> bool:
    if targets is None or targets == "all-linear":
        return False
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)
