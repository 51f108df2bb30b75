"""Weights that share memory with those of another adapted model: training one would change the others."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..calibrate.weights import Memory
from .base_layer import TunerLayer
from .transitions import exclusively

# The layers of all models, but for those that were unloaded.
_adapted: weakref.WeakSet[TunerLayer[Any]] = weakref.WeakSet()


def note_adapted(layer: TunerLayer[Any]) -> None:
    """A model has this layer from now on."""
    exclusively(_adapted.add, layer)


def note_unloaded(layer: TunerLayer[Any]) -> None:
    """No model has this layer any more."""
    exclusively(_adapted.discard, layer)


def check_no_other_model(model: nn.Module, weights: Mapping[str, Tensor], resident: bool) -> None:
    """Refuse weights that layers of another adapted model have, if one of the two holds entries in its weight.

    Args:
        model: the one that is adapted.
        weights: ``{layer name: weight}`` of the targets that have no adapters yet.
        resident: whether these weights are to hold entries.

    Raises:
        ValueError: names both layers.
    """
    if _shared_with_others(model, weights, resident) is None:
        return
    gc.collect()  # models that nothing refers to but they themselves
    found = _shared_with_others(model, weights, resident)
    if found is not None:
        name, other = found
        raise ValueError(
            f"Target module {name} shares its weight with layer {other.name} of another model with adapters, which "
            "would compute with this one's entries in its weight. Make this model from a copy (copy.deepcopy), or "
            "unload() the other one first."
        )


def _shared_with_others(
    model: nn.Module, weights: Mapping[str, Tensor], resident: bool
) -> tuple[str, TunerLayer[Any]] | None:
    own = {id(module) for module in model.modules()}
    layers = [layer for layer in exclusively(list, _adapted) if id(layer) not in own and (resident or layer.resident)]
    parameters = [(layer, _weight_of(layer)) for layer in layers]
    others = [(layer, Memory.of(weight)) for layer, weight in parameters if weight is not None]
    for name, weight in weights.items():
        memory = Memory.of(weight)
        for layer, other in others:
            if memory.overlaps(other):
                return name, layer
    return None


def _weight_of(layer: TunerLayer[Any]) -> Tensor | None:
    """The base weight; None where it is packed."""
    own = layer.base_parameters.get("weight")
    return layer.get_base_layer()._parameters.get("weight") if own is None else own
