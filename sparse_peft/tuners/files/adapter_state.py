"""An adapter's tensors on their way from a model into a file and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..base_config import BaseSparseConfig
from .accepted_tensors import Entries, named_states
from .checks import values_on_disk


def put_states(entries: Entries, model: nn.Module, config: BaseSparseConfig, adapter_name: str) -> None:
    """Replace the layers' states in the model's state dict by those that a file has.

    Args:
        entries: the adapter's part of the state dict; changed in place.
        model: that has the adapter.
        config: the adapter's.
        adapter_name: its name.

    Raises:
        ValueError: values that are not finite, or too large for ``save_dtype``.
    """
    dtype = getattr(torch, config.save_dtype)
    for key, layer, state in named_states(model, adapter_name):
        found = {name: entries[f"{key}{name}"].detach() for name in state._parameters if f"{key}{name}" in entries}
        if not found:
            continue
        for name, tensor in found.items():
            kept = name in state.full_precision or tensor.dtype != torch.float32
            entries[f"{key}{name}"] = values_on_disk(tensor, tensor.dtype if kept else dtype, layer.name)
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
