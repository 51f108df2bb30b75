"""The weights of a model's layers: below adapters, and in memory of their own."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def base_of(module: nn.Module) -> Any:
    """The layer that holds the weight, below any adapters."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


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
                f"Target module {layer} shares its weight with {others} (tied weights): changing one would "
                "change the other. Leave it out with exclude_modules, or untie the weights first (load the model with "
                "tie_word_embeddings=False and copy the weight)."
            )
