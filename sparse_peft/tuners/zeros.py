"""Zeros of a pruned base that merging fills."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from .traversal import tuner_layers

# A weight with fewer zeros was not pruned.
LEAST_SHARE = 0.05


def zeros_of_layers(model: nn.Module) -> dict[str, int]:
    """``{layer name: zeros of its weight}`` of the layers with adapters whose base weight was pruned."""
    found = {}
    for layer in tuner_layers(model):
        weight = None if layer.merged else _plain_weight(layer.get_base_layer())
        if weight is not None and _zeros(weight) >= LEAST_SHARE * weight.numel():
            found[layer.name] = _zeros(weight)
    return found


def warn_of_filled_zeros(model: nn.Module, before: dict[str, int]) -> None:
    """Warn of a merged model that has fewer zeros than its base had; ``before`` is from ``zeros_of_layers``."""
    modules, filled = dict(model.named_modules()), {}
    for name, zeros in before.items():
        weight = _plain_weight(modules.get(name))
        if weight is not None and _zeros(weight) < zeros:
            filled[name] = zeros - _zeros(weight)
    if filled:
        warnings.warn(
            f"merging fills {sum(filled.values())} zeros of {len(filled)} layers of a pruned base, such as "
            f"{next(iter(filled))}; for an adapter that keeps them train with preserve_zeros=True, with "
            "SparseConfig(selection='nonzero'), or with PruneConfig(score='nonzero')",
            UserWarning,
            stacklevel=4,
        )


def _plain_weight(module: nn.Module | None) -> Tensor | None:
    """A module's weight in floats and in memory; None without."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or type(weight) not in (nn.Parameter, Tensor):
        return None
    return None if weight.is_meta or not weight.is_floating_point() else weight.detach()


def _zeros(weight: Tensor) -> int:
    return weight.numel() - int(torch.count_nonzero(weight))
