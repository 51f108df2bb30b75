"""Walking through a model's layers and adapters' configs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from .base_layer import TunerLayer


def modules_beside_adapters(model: nn.Module) -> Iterator[nn.Module]:
    """The model's modules in their order, without those of its adapters, of which there may be hundreds."""
    return (module for _, module in named_modules_beside_adapters(model))


def named_modules_beside_adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """``modules_beside_adapters`` with their names."""
    seen: set[int] = set()
    waiting: list[tuple[str, nn.Module | None]] = [("", model)]
    while waiting:
        name, module = waiting.pop()
        if module is None or id(module) in seen:
            continue
        seen.add(id(module))
        yield name, module
        prefix = f"{name}." if name else ""
        if isinstance(module, TunerLayer):
            waiting.append((f"{prefix}base_layer", module._modules.get("base_layer")))
        else:
            waiting.extend((f"{prefix}{child}", part) for child, part in reversed(module._modules.items()))


def tuner_layers(model: nn.Module) -> Iterator[TunerLayer]:
    """The model's layers with adapters of this package; of layers with one tied weight the owner."""
    # in every training step of all modules: without their names, and past those that have no parts
    seen: set[int] = set()
    waiting: list[nn.Module | None] = [model]
    while waiting:
        module = waiting.pop()
        if module is None or not module._modules or id(module) in seen:
            continue
        seen.add(id(module))
        if isinstance(module, TunerLayer):
            if module.owner is module:
                yield module
            waiting.append(module._modules.get("base_layer"))
        else:
            waiting.extend(reversed(module._modules.values()))


def first_parameter(model: nn.Module) -> nn.Parameter | None:
    """The first of ``model.parameters()``; finding it there builds many names, which costs too much in a pass."""
    for parameter in model._parameters.values():
        if parameter is not None:
            return parameter
    for child in model._modules.values():
        if child is not None and (found := first_parameter(child)) is not None:
            return found
    return None


def configs_of(model: nn.Module) -> dict[str, Any]:
    """The adapters' configs, wherever in the model (or in what wraps it) PEFT keeps them."""
    found: dict[str, Any] = {}
    for module in model.modules():
        configs = module.__dict__.get("peft_config") or {}
        if isinstance(configs, dict):
            found.update(configs)
    return found
