"""Weights that share memory: training one would change the others."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .base_layer import TunerLayer
from .transitions import exclusively

# The layers of all models, but for those that were unloaded.
_adapted: weakref.WeakSet[TunerLayer[Any]] = weakref.WeakSet()


class Memory(NamedTuple):
    """The bytes ``start`` to ``stop`` of a device. A tensor without memory has its identity instead."""

    device: object
    start: int
    stop: int

    @classmethod
    def of(cls, tensor: Tensor) -> Memory:
        if tensor.is_meta or is_traceable_wrapper_subclass(tensor):
            return cls(None, id(tensor), id(tensor) + 1)
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        size = (last + 1) * tensor.element_size() if tensor.numel() else 0
        return cls(tensor.device, tensor.data_ptr(), tensor.data_ptr() + size)

    def overlaps(self, other: Memory) -> bool:
        return self.device == other.device and max(self.start, other.start) < min(self.stop, other.stop)


def check_no_shared_weights(
    model: nn.Module, weights: Mapping[str, Tensor], ties: Iterable[Collection[str]] = ()
) -> None:
    """Refuse weights that something else in the model uses too, as one parameter or as two of the same memory.

    Args:
        model: that has them.
        weights: ``{layer name: weight}`` of the targets.
        ties: names of layers that may have one weight, because they get one delta.

    Raises:
        ValueError: names the target and what else has its weight.
    """
    names = [(name, Memory.of(parameter)) for name, parameter in model.named_parameters(remove_duplicate=False)]
    for layer, weight in weights.items():
        memory = Memory.of(weight)
        group = next((group for group in ties if layer in group), [layer])
        expected = {f"{name}{part}" for name in group for part in ("", ".weight", ".base_layer.weight")}
        sharing = [name for name, other in names if memory.overlaps(other)]
        if len(sharing) > 1 and not (len(group) > 1 and expected.issuperset(sharing)):
            others = ", ".join(name for name in sharing if name not in (layer, f"{layer}.weight"))
            raise ValueError(
                f"Target module {layer} shares its weight with {others} (tied weights): training one would change "
                "the other. Leave it out with exclude_modules, or untie the weights first (load the model with "
                "tie_word_embeddings=False and copy the weight)."
            )


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
