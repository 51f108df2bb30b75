"""An adapter's tensors on their way from a model into a file and back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from torch import Tensor, nn

from ..base_config import BaseSparseConfig
from ..base_layer import TunerLayer
from ..base_state import TrainedState
from .checks import check_values

Entries = dict[str, Tensor]  # {name in the model's state dict: tensor}


def named_states(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, TunerLayer, TrainedState]]:
    """``(prefix of its tensors' names, layer, trained state)`` of each layer of an adapter."""
    for name, module in model.named_modules():
        if isinstance(module, TunerLayer) and adapter_name in module.deltas:
            name = name.removeprefix("_fsdp_wrapped_module.")
            key = f"{module.delta_container}.{adapter_name}."
            yield f"{name}.{key}" if name else key, module, module.deltas[adapter_name]


def put_states(entries: Entries, model: nn.Module, config: BaseSparseConfig, adapter_name: str) -> None:
    """Put the layers' states as a file has them in the place of those in the model's state dict.

    Args:
        entries: the adapter's part of the state dict; changed in place.
        model: that has the adapter.
        config: the adapter's.
        adapter_name: its name.

    Raises:
        ValueError: values that are not finite.
    """
    dtype = getattr(torch, config.save_dtype)
    for key, layer, state in named_states(model, adapter_name):
        found = {name: entries[f"{key}{name}"].detach() for name in state._parameters if f"{key}{name}" in entries}
        if not found:
            continue
        for name, tensor in found.items():
            check_values(tensor, layer.name, "save")
            if tensor.dtype == torch.float32 and name not in state.full_precision:
                entries[f"{key}{name}"] = tensor.to(dtype)
        # positions that no file brought are chosen now; the state dict was taken before
        for name in state.position_names:
            entries.pop(f"{key}{name}", None)
        files = layer.settled(adapter_name).file_tensors()
        entries.update({f"{key}{name}": tensor for name, tensor in files.items()})


def take_states(
    entries: Entries,
    model: nn.Module,
    adapter_name: str,
    fit: Callable[[Any, dict[str, Tensor]], None],
    name_in_file: Callable[[str], str],
) -> None:
    """Check a file's tensors, and put them in the form that the layers' states have in memory.

    Args:
        entries: the file's tensors under the names that they have in the model; changed in place.
        model: that has the adapter.
        adapter_name: its name.
        fit: called with each state and its parameters in the file, before these are checked.
        name_in_file: the name that a tensor of the model has in a file.

    Raises:
        ValueError: tensors are missing, contradict each other or the model, or are not finite.
    """
    for key, layer, state in named_states(model, adapter_name):
        parameters = {name: entries[f"{key}{name}"] for name in state._parameters if f"{key}{name}" in entries}
        fit(state, parameters)
        found = {}
        for name in state.position_names:
            # PEFT maps only the names that the model has, and positions may have others in a file
            in_file = name_in_file(f"{key}{name}")
            for candidate in (f"{key}{name}", in_file, f"base_model.model.{in_file}"):
                if candidate in entries:
                    found[name] = entries.pop(candidate)
        positions = state.take_file(found, parameters)
        entries.update({f"{key}{name}": tensor for name, tensor in positions.items()})
        layer.release()


def check_no_base_weights(model: nn.Module, config: BaseSparseConfig, adapter_name: str, entries: Entries) -> None:
    """Refuse a file that would replace weights of the base: without the adapter the model must be the base.

    What PEFT saves of the base, where asked to, is accepted: biases, embeddings, modules to save. Biases that were
    not asked for are taken, as PEFT takes them, with a warning.

    Raises:
        ValueError: names the weight.
    """
    biases = []
    for name in model.state_dict():
        parts = name.split(".")
        if name not in entries or adapter_name in parts or set(parts) & set(EMBEDDING_LAYER_NAMES):
            continue
        if parts[-1] == "bias":
            biases.append(name)
            continue
        raise ValueError(
            f"the adapter file has {name}, a weight of the base model, which such an adapter leaves as it is "
            f"(modules_to_save={config.modules_to_save!r}); the file is damaged, or written to change the base "
            "unnoticed"
        )
    if biases and config.bias == "none":
        warnings.warn(
            f"the adapter file has biases of the base model, such as {biases[0]}, though its config says "
            "bias='none'; they are put in the place of the base's own, and stay there without the adapter",
            stacklevel=2,
        )
