"""What an adapter makes of the base model's parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from peft import PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..adapters.files import config_of
from ..ops import effective_entries, read_entries, read_support
from ..support import Support
from ..tuners.base_layer import TunerLayer
from ..tuners.expert_weights import ExpertWeight
from ..tuners.residency import base_weights
from ..tuners.traversal import tuner_layers
from .fingerprint import fingerprint


@dataclass(frozen=True, eq=False)
class Held:
    """Entries of one parameter that differ from the base's.

    Attributes:
        shape: of the parameter.
        indices: ``(entries,)`` flat positions, strictly increasing; None for all entries.
        values: ``(entries,)`` absolute, in the base's dtype.
        originals: ``(entries,)`` the base's own entries there; None if they are not known.
    """

    shape: tuple[int, ...]
    indices: Tensor | None
    values: Tensor
    originals: Tensor | None = None


Snapshot = Mapping[str, Held]  # {parameter's name without adapters: what the adapter makes of it}


class AdapterSource:
    """The parameters that one adapter of a model changes.

    Args:
        model: that has the adapter, with or without PEFT's wrapper.
        adapter_name: which; the active one if None.

    Raises:
        ValueError: no such adapter, several active ones, or a base whose weights are quantised or sharded.
    """

    def __init__(self, model: nn.Module, adapter_name: str | None = None):
        self.model = model
        self.adapter_name = _active_name(model) if adapter_name is None else adapter_name
        self.config = config_of(model, self.adapter_name)
        self.layers = dict(_named_layers(model, self.adapter_name))
        for name, layer in self.layers.items():
            _check_layer(name, layer)
        self.beside = sorted(self._tensors_beside())

    def base_parameters(self) -> dict[str, Tensor]:
        """The adapted layers' own weights, ``{name: tensor}``."""
        return {name: layer.base_parameter.detach() for name, layer in self.layers.items()}

    def base_fingerprint(self) -> str:
        """Of the adapted layers' own weights.

        Raises:
            ValueError: adapters are merged.
        """
        merged = sorted({name for layer in self.layers.values() for name in layer.merged_adapters})
        if merged:
            raise ValueError(f"adapters {', '.join(merged)} are merged; make the publisher before merge_adapter()")
        with base_weights(self.model):
            return fingerprint(self.base_parameters())

    @torch.no_grad()
    def snapshot(self, earlier: Snapshot | None = None) -> dict[str, Held]:
        """What the adapter makes of each parameter now; the same bits as merging it.

        Args:
            earlier: a snapshot of this source. Where positions are the same, the base's entries are taken from it,
                which saves most of the time.

        Raises:
            ValueError: values that are not finite, or other adapters that are merged.
        """
        self._check_merged()
        old = earlier or {}
        with base_weights(self.model):
            found = {name: _held(layer, self.adapter_name, old.get(name)) for name, layer in self.layers.items()}
        beside = self._tensors_beside() if self.beside else {}
        found |= {name: _whole(beside[name]) for name in self.beside}
        for name, held in found.items():
            if not torch.isfinite(held.values).all():
                raise ValueError(
                    f"{name}: adapter {self.adapter_name!r} makes values that are not finite, and nothing is "
                    "published; go back to an earlier checkpoint, or lower the learning rate"
                )
        return found

    def base_entries(self, name: str, indices: Tensor) -> Tensor:
        """The base's own entries at flat positions of one parameter; called inside ``base_weights``."""
        weight = self.layers[name].base_parameter.detach()
        return read_entries(weight, indices.to(weight.device))

    def _check_merged(self) -> None:
        """Refuse weights that hold other adapters; merged with this one alone they have the entries themselves."""
        for name, layer in self.layers.items():
            if layer.merged_adapters not in ([], [self.adapter_name]):
                raise ValueError(
                    f"{name}: adapters {', '.join(layer.merged_adapters)} are merged; call unmerge_adapter() "
                    f"before publishing {self.adapter_name!r}"
                )

    def _tensors_beside(self) -> dict[str, Tensor]:
        """What the adapter trains beside its layers: biases, modules saved whole."""
        found: dict[str, Tensor] = {}
        for name, module in _inner(self.model).named_modules():
            if isinstance(module, AuxiliaryTrainingWrapper):
                found |= _saved_whole(name, module, self.adapter_name)
            elif self._trains_bias(name, module):
                found[f"{name.removesuffix('.base_layer')}.bias"] = module.bias
        return found

    def _trains_bias(self, name: str, module: nn.Module) -> bool:
        if self.config.bias == "none" or not isinstance(getattr(module, "bias", None), nn.Parameter):
            return False
        inside = any(part in ("modules_to_save", "original_module") for part in name.split("."))
        layer = _inner(self.model).get_submodule(name.removesuffix(".base_layer"))
        is_adapted = isinstance(layer, TunerLayer) and self.adapter_name in layer.deltas
        return not inside and (self.config.bias == "all" or is_adapted)


def _inner(model: nn.Module) -> nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _saved_whole(name: str, wrapper: AuxiliaryTrainingWrapper, adapter_name: str) -> dict[str, Tensor]:
    """The adapter's own copy of a module that PEFT saves whole."""
    if hasattr(wrapper, "token_adapter"):
        raise ValueError(
            f"{name}: trainable_token_indices cannot be published, since PEFT adds trained tokens in each pass; train "
            "the whole embedding with modules_to_save instead"
        )
    copies = getattr(wrapper, "modules_to_save", {})
    if adapter_name not in copies:
        return {}
    return {f"{name}.{part}": tensor for part, tensor in copies[adapter_name].state_dict().items()}


def _active_name(model: nn.Module) -> str:
    names = {tuple(layer.active_adapters) for layer in tuner_layers(model)}
    if len(names) != 1 or len(next(iter(names))) != 1:
        found = ", ".join(sorted(map(str, names))) or "none"
        raise ValueError(f"adapter_name=None: exactly one active adapter is expected, found {found}; name one")
    return next(iter(names))[0]


def _named_layers(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, TunerLayer]]:
    """The adapter's layers under the names of their weights; an expert parameter has the layer's own name."""
    for name, module in _inner(model).named_modules():
        if isinstance(module, TunerLayer) and module.owner is module and adapter_name in module.deltas:
            yield name if isinstance(module.base_layer, ExpertWeight) else f"{name}.weight", module


def _check_layer(name: str, layer: TunerLayer) -> None:
    if layer.quantization_backend is not None:
        raise ValueError(
            f"{name}: a {layer.quantization_backend.backend_name} base has no entries that an engine could "
            "take; load the base in bfloat16, float16 or float32 to publish the adapter"
        )
    if isinstance(layer.base_parameter, DTensor):
        raise ValueError(
            f"{name}: the base weight is sharded; publish from a process that has the whole model, or save the "
            "adapter and load it there"
        )


def _held(layer: TunerLayer, adapter_name: str, earlier: Held | None) -> Held:
    state, weight = layer.settled(adapter_name), layer.base_parameter.detach()
    shape, is_merged = tuple(weight.shape), bool(layer.merged_adapters)
    if not state.is_sparse:
        merged = weight.clone() if is_merged else layer.merged_weight((adapter_name,)).to(weight.dtype)
        return Held(shape, None, merged.flatten())
    entries = state.as_sparse()
    support, originals = entries.support, _known_originals(earlier, entries.support)
    if is_merged:
        return Held(shape, support.indices, read_support(weight, support), originals)
    if originals is None:
        originals = read_support(weight, support)
    return Held(shape, support.indices, effective_entries(originals, entries.values), originals)


def _known_originals(earlier: Held | None, support: Support) -> Tensor | None:
    """The base's entries at a support that an earlier snapshot has as well; reading them misses most caches."""
    if earlier is None or earlier.indices is None or not torch.equal(earlier.indices, support.indices):
        return None
    return earlier.originals


def _whole(tensor: Tensor) -> Held:
    return Held(tuple(tensor.shape), None, tensor.detach().flatten().clone())
