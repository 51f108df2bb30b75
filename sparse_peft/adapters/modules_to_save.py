"""Tensors that are no deltas, stored whole with an adapter: ``modules_to_save`` and biases."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from .entry_format import BIAS_OF_LAYERS
from .files import PREFIX

# Treatments of such tensors.
OTHERS = ("leave_out", "save", "refuse")

Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class WholeTensors:
    """Tensors that are stored whole.

    Attributes:
        tensors: ``{name in the file: tensor}``.
        modules: for the config's ``modules_to_save``.
        bias: the config's.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)
    bias: str = "none"


def save_whole(
    structure: nn.Module, shapes: Mapping[str, tuple[int, ...]], adapted: Collection[str], read: Read
) -> WholeTensors:
    """The tensors to store so that those named change: their modules', and those tied to them.

    Args:
        structure: the model.
        shapes: ``{name: shape}`` of the tensors that must be among them.
        adapted: the layers with deltas, whose biases are stored by PEFT's ``bias`` and not as modules.
        read: gives a tensor of the model by name.

    Raises:
        ValueError: tensors of another shape than the model's, or of a module with others inside.
    """
    _check_shapes(structure, shapes)
    tied = _tied_names(structure)
    wanted = {twin for name in shapes for twin in tied.get(name, [name])}
    owners = dict.fromkeys(name.rpartition(".")[0] for name in sorted(wanted))
    modules = [module for module in owners if module not in adapted]
    tensors = {}
    for module in modules:
        for leaf in _saved_module(structure, module, adapted).state_dict():
            tensors[f"{PREFIX}{module}.{leaf}"] = _read_tied(f"{module}.{leaf}", tied, read)
    if len(modules) == len(owners):
        return WholeTensors(tensors, modules)
    return WholeTensors({**tensors, **_biases(structure, adapted, read)}, modules, BIAS_OF_LAYERS)


def _check_shapes(structure: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    own = {name: tuple(tensor.shape) for name, tensor in structure.state_dict().items()}
    for name, shape in shapes.items():
        if own.get(name) != tuple(shape):
            raise ValueError(
                f"{name}: of shape {tuple(shape)}, and the base model has {own.get(name, 'no such tensor')}; what was "
                "added or resized cannot be stored with an adapter: prepare the base model in the same way first"
            )


def _tied_names(structure: nn.Module) -> dict[str, list[str]]:
    """``{name: names of the same parameter}``."""
    twins: dict[int, list[str]] = {}
    for name, parameter in structure.named_parameters(remove_duplicate=False):
        twins.setdefault(id(parameter), []).append(name)
    return {name: group for group in twins.values() for name in group}


def _saved_module(structure: nn.Module, name: str, adapted: Collection[str]) -> nn.Module:
    """A module that PEFT can save whole beside the adapted layers.

    Raises:
        ValueError: it cannot.
    """
    module = structure.get_submodule(name)
    if any(True for _ in module.children()):
        raise ValueError(f"{name}: it has other layers inside and cannot be stored whole beside their deltas")
    clash = next((layer for layer in adapted if layer.endswith(name)), None)
    if clash is not None:
        raise ValueError(
            f"{name}: PEFT takes names in modules_to_save for ends of names, and the adapted layer {clash} ends like "
            "this; pass others='leave_out', or keep it out of target_modules"
        )
    return module


def _biases(structure: nn.Module, adapted: Collection[str], read: Read) -> dict[str, Tensor]:
    names = structure.state_dict().keys()
    return {f"{PREFIX}{layer}.base_layer.bias": read(f"{layer}.bias") for layer in adapted if f"{layer}.bias" in names}


def _read_tied(name: str, tied: Mapping[str, list[str]], read: Read) -> Tensor:
    """A tensor, under the first of the names that share it that the file has."""
    for candidate in (name, *tied.get(name, [])):
        try:
            return read(candidate).clone()
        except KeyError:
            continue
    raise ValueError(f"{name}: the fine-tuned model's file has no such tensor")
