"""Several adapters of one method made into one: of a live model, or of what was read from files.

What a layer's states become is the states' own business (``combine``),
the config's fields are those of the method's model class (``combined_fields``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from peft import set_peft_model_state_dict
from torch import Tensor

from ..ops import Combination, check_weights
from .base_config import BaseSparseConfig
from .base_state import TrainedState
from .experts import is_named
from .traversal import tuner_layers

if TYPE_CHECKING:
    from .base_model import BaseSparseModel

ConfigT = TypeVar("ConfigT", bound=BaseSparseConfig)
Tensors = dict[str, dict[str, Tensor]]  # {layer: {tensor: as it lies in a file}}


def check_combination(kind: type[TrainedState], method: str, how: Combination) -> None:
    """Refuse combinations that a method's states do not have, and say which they have.

    Raises:
        ValueError: there is no such combination.
    """
    if how.combination_type in kind.combinations:
        return
    if not kind.combinations:
        raise ValueError(
            f"combination_type={how.combination_type!r}: the deltas of {method} adapters do not add up; merge one "
            f"with merge_and_unload(), and train or load the next on the merged model{kind.why_these_combinations}"
        )
    raise ValueError(
        f"combination_type={how.combination_type!r}: {method} has {', '.join(kind.combinations)}: "
        f"{kind.why_these_combinations}"
    )


def combine_states(
    adapters: Sequence[Mapping[str, TrainedState]], weights: Sequence[float], how: Combination, method: str
) -> Tensors:
    """What the adapters' states become, layer by layer; an adapter that lacks a layer counts as zero there.

    Args:
        adapters: ``{layer name: trained state}`` of each.
        weights: one number for each.
        how: the combination.
        method: the method's name, for errors.

    Raises:
        ValueError: weights that do not fit, adapters without layers, or a combination that the method does not have.
    """
    check_weights(weights, len(adapters))
    layers = dict.fromkeys(name for states in adapters for name in states)
    if not layers:
        raise ValueError("adapters: none of them has a layer; name at least one that has")
    combined: Tensors = {}
    for layer in layers:
        parts = [(states[layer], weight) for states, weight in zip(adapters, weights, strict=True) if layer in states]
        states = [state for state, _ in parts]
        check_combination(type(states[0]), method, how)
        combined[layer] = type(states[0]).combine(states, [weight for _, weight in parts], how)
    return combined


def add_weighted_adapter(
    tuner: BaseSparseModel[Any, Any],
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    how: Combination,
) -> None:
    """Give a tuner's model a new adapter made of several that it has; see ``BaseSparseModel.add_weighted_adapter``."""
    configs = combinable_configs(tuner, adapters, adapter_name)
    states: list[dict[str, TrainedState]] = [{} for _ in adapters]
    for layer in tuner_layers(tuner.model):
        for found, name in zip(states, adapters, strict=True):
            if name in layer.deltas:
                found[layer.name] = layer.settled(name)
    combined = combine_states(states, weights, how, type(tuner).__name__)
    config = combined_config(type(tuner), configs, combined)
    container = next(tuner_layers(tuner.model)).delta_container
    state_dict = {
        f"{layer}.{container}.{name}": tensor for layer, found in combined.items() for name, tensor in found.items()
    }
    tuner.peft_config[adapter_name] = config
    try:
        tuner.inject_adapter(tuner.model, adapter_name, state_dict=state_dict)
        set_peft_model_state_dict(tuner.model, state_dict, adapter_name=adapter_name)
    except BaseException:
        tuner.delete_adapter(adapter_name)
        raise


def combined_config(
    tuner: type[BaseSparseModel[ConfigT, Any]], configs: Sequence[ConfigT], tensors: Tensors
) -> ConfigT:
    """The config of an adapter made of others.

    Args:
        tuner: the method's model class.
        configs: the others', the first of which gives what is not resolved anew.
        tensors: the new adapter's, by layer; they may be filled up to fit the config.
    """
    shapes = {name: shape for config in configs for name, shape in (config.weight_shapes or {}).items()}
    experts = [name for name in tensors if any(is_named(config.target_parameters, name) for config in configs)]
    resolved = tuner.combined_fields(configs, tensors)
    return replace(
        configs[0],
        target_modules=[name for name in tensors if name not in experts],
        target_parameters=experts or None,
        target_experts=False,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        init_weights=True,
        save_dtype="float32",
        recommended_rate=None,
        weight_shapes={name: list(shapes[name]) for name in tensors},
        **resolved,
    )


def combinable_configs(
    tuner: BaseSparseModel[ConfigT, Any], adapters: Sequence[str], adapter_name: str
) -> list[ConfigT]:
    """The configs of adapters that are to become a new one.

    Raises:
        ValueError: names that do not fit, or adapters that train more than their layers' deltas.
    """
    known = ", ".join(map(repr, tuner.configs))
    if isinstance(adapters, str) or not adapters:
        raise ValueError(f"adapters={adapters!r}: a list of names of adapters is expected; the model has {known}")
    unknown = [name for name in adapters if name not in tuner.configs]
    if unknown:
        raise ValueError(f"adapters: the model has no adapter {unknown[0]!r}; it has {known}")
    if adapter_name in tuner.configs:
        raise ValueError(f"adapter_name={adapter_name!r}: the model has an adapter of this name; choose another")
    configs = [tuner.configs[name] for name in adapters]
    for name, config in zip(adapters, configs, strict=True):
        beside = [field for field in ("modules_to_save", "trainable_token_indices") if getattr(config, field, None)]
        if config.bias != "none":
            beside.append("bias")
        if beside:
            raise ValueError(
                f"adapters: {name!r} trains more than its layers' deltas ({', '.join(beside)}), which weights do not "
                "combine; save the adapters and use sparse_peft.adapters.compose or soup, which say how they treat it"
            )
    return configs
