"""Tied weights: one parameter of an embedding and of other layers, which has one support and one set of adapters.

The first of these layers in the model is the *owner*. It has the adapters, whichever of the layers a config names: the
weight is one tensor, so every layer computes with the delta, and the values' gradient is the sum of all layers'.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, cast

from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .base_config import BaseSparseConfig
from .experts import is_named
from .targets import Targets, base_of, outermost_layers


def tied_layers(model: nn.Module) -> list[Targets]:
    """``{layer name: module}`` of each parameter that an embedding and other layers have, in the model's order.

    Linear layers alone, and parameters that share memory without being one, are not among them.
    """
    groups: dict[int, Targets] = {}
    saved_whole = _parts_of_wrappers(model)
    for name, module in outermost_layers(model):
        base = base_of(module)
        weight = base._parameters.get("weight") if isinstance(base, (nn.Embedding, nn.Linear)) else None
        if weight is not None and not name.startswith(saved_whole):
            groups.setdefault(id(weight), {})[name] = module
    return [group for group in groups.values() if len(group) > 1 and any(map(_is_embedding, group.values()))]


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(base_of(module), nn.Embedding)


def _parts_of_wrappers(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the names of modules in PEFT's wrappers, which have a say of their own in what is computed."""
    return tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper))


def owners_of(config: BaseSparseConfig, model: nn.Module, targets: Targets, ties: Iterable[Targets]) -> Targets:
    """The targets, with the owner in place of layers whose weight is tied to it.

    Raises:
        ValueError: a config names one of the layers, and leaves out another by ``exclude_modules``.
    """
    found = dict(targets)
    for group in ties:
        named = [name for name in group if found.pop(name, None) is not None]
        if named:
            _check_not_excluded(config, named[0], group)
            owner = next(iter(group))
            found[owner] = group[owner]
    if found.keys() == targets.keys():
        return targets
    order = {name: number for number, (name, _) in enumerate(model.named_modules())}
    place = {name: order[name] if name in order else order[name.rpartition(".")[0]] for name in found}
    return dict(sorted(found.items(), key=lambda item: place[item[0]]))


def _check_not_excluded(config: BaseSparseConfig, named: str, group: Targets) -> None:
    for name in group:
        if isinstance(check_target_module_exists(config, name), _ExcludedModule):
            raise ValueError(
                f"exclude_modules={config.exclude_modules!r} leaves out {name}, whose weight is that of {named} in "
                f"target_modules={config.target_modules!r} (tied weights): both train, or none. Name both or none, or "
                "load the model with tie_word_embeddings=False"
            )


def check_not_saved_whole(config: BaseSparseConfig, model: nn.Module, targets: Targets, ties: list[Targets]) -> None:
    """Refuse an embedding or a tied weight that is trained in another way as well.

    Raises:
        ValueError: names the fields and the layers.
    """
    tied = {name for group in ties for name in group}
    others = {name: module for name, module in outermost_layers(model) if _is_embedding(module) and name not in tied}
    for group in (*ties, *({name: module} for name, module in others.items())):
        # PEFT takes modules_to_save out of the targets
        target = next((name for name in group if name in targets or is_named(config.target_modules, name)), None)
        if target is None:
            continue
        for other in (name for name in group if is_named(config.modules_to_save, name)):
            raise ValueError(_trained_twice(f"modules_to_save={config.modules_to_save!r}", other, target))
        for other in _layers_of_tokens(config, model, group):
            raise ValueError(
                _trained_twice(f"trainable_token_indices={config.trainable_token_indices}", other, target)
            )


def _layers_of_tokens(config: BaseSparseConfig, model: nn.Module, group: Targets) -> Iterator[str]:
    """Which of the layers have tokens in ``trainable_token_indices``."""
    tokens = config.trainable_token_indices
    if isinstance(tokens, dict):
        yield from (name for name in group if is_named(list(tokens), name))
    elif tokens and hasattr(model, "get_input_embeddings"):
        embedding = cast("Any", model).get_input_embeddings()
        yield from (name for name, module in group.items() if module is embedding)


def _trained_twice(field: str, other: str, target: str) -> str:
    same = "" if other == target else f", whose weight is that of {other} (tied weights)"
    return (
        f"{field} names {other}, and target_modules {target}{same}: a weight trains in one of these ways. Leave it "
        "out of one of the two"
    )
