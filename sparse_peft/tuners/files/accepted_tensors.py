"""Which tensors of a file a model takes: those that saving the adapter writes. Every other is refused by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import NoReturn

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig

from ..base_config import BaseSparseConfig
from ..base_layer import TunerLayer
from ..base_state import TrainedState
from ..traversal import named_modules_beside_adapters
from .adapter_file import is_reading
from .checks import DAMAGED

Entries = dict[str, Tensor]  # {name in the model's state dict: tensor}
FSDP = "_fsdp_wrapped_module."  # before all module names of a wrapped model, and in no state dict
PREFIX = "base_model.model."  # of all names in a file, and in the state dict of a PeftModel


def named_states(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, TunerLayer, TrainedState]]:
    """``(prefix of its tensors' names, layer, trained state)`` of each layer of an adapter."""
    for name, module in named_modules_beside_adapters(model):
        if isinstance(module, TunerLayer) and module.owner is module and adapter_name in module.deltas:
            name = name.removeprefix(FSDP)
            key = f"{module.delta_container}.{adapter_name}."
            yield f"{name}.{key}" if name else key, module, module.deltas[adapter_name]


def accept_tensors(
    entries: Entries,
    model: nn.Module,
    config: BaseSparseConfig,
    adapter_name: str,
    name_in_file: Callable[[str], str],
    *,
    biases: Iterable[str],
    whole_model: bool = False,
) -> None:
    """Refuse a file with tensors that saving the adapter would not write: without the adapter the model is its base.

    Accepted are the adapter's own tensors, modules to save and trained tokens, the biases that ``bias`` names, and
    the embeddings of a vocabulary that was resized. PEFT may save other embeddings as well. They are left out where
    they repeat the base's, and refused where they differ. From a state dict that is no file's, any bias is accepted.

    Args:
        entries: the file's tensors under the names that they have in the model; changed in place.
        model: that has the adapter.
        config: the adapter's.
        adapter_name: its name.
        name_in_file: the name that a tensor of the model has in a file.
        biases: names of those that PEFT saves for this config.
        whole_model: whether the file has all weights of the base.

    Raises:
        ValueError: names such a tensor, and says what it is.
    """
    present = {name if _is_prefixed(model) else name.removeprefix(PREFIX): name for name in entries}
    accepted = {*_names_of_states(model, adapter_name), *_names_of_wrappers(model, adapter_name)}
    accepted |= set(biases) - _names_of_other_adapters(model, adapter_name)
    others = set(present) - _with_file_names(accepted, name_in_file)
    if not others:
        return
    base = model.state_dict()
    embeddings = names_of_embeddings(model, base)
    if whole_model:
        others -= _with_file_names(set(base), name_in_file)
    elif others & embeddings and is_resized(model, config):
        others -= embeddings
    for name in sorted(others & embeddings):
        if _is_the_same(base[name], entries[present[name]]):
            del entries[present[name]]
            others.remove(name)
    if not is_reading():
        others -= _biases(others, base)
    if others:
        _refuse([name for name in present if name in others], model, config, base)


def _biases(names: set[str], base: Iterable[str]) -> set[str]:
    """Which of these are biases of the base, with a warning: PEFT takes them from a state dict in any case."""
    biases = {name for name in names if name.endswith(".bias") and name in base}
    if biases:
        warnings.warn(
            f"the state dict has biases of the base model, such as {min(biases)}, which the adapter's config does not "
            "name (bias='none'); they replace the base's own, and stay there without the adapter",
            stacklevel=2,
        )
    return biases


def _is_prefixed(model: nn.Module) -> bool:
    return any(name.startswith(PREFIX) for name, _ in model.named_parameters())


def _with_file_names(names: set[str], name_in_file: Callable[[str], str]) -> set[str]:
    return names | {name_in_file(name) for name in names}


# ---------------------------------------------------------------------- what an adapter has


def _names_of_states(model: nn.Module, adapter_name: str) -> Iterator[str]:
    for key, _, state in named_states(model, adapter_name):
        yield from (f"{key}{name}" for name in (*state._parameters, *state._buffers, *state.position_names))


def _wrappers(model: nn.Module) -> Iterator[tuple[str, AuxiliaryTrainingWrapper]]:
    """What PEFT puts around modules that are saved whole, and around embeddings with trained tokens."""
    for name, module in named_modules_beside_adapters(model):
        if isinstance(module, AuxiliaryTrainingWrapper):
            yield name.removeprefix(FSDP), module


def _names_of_wrappers(model: nn.Module, adapter_name: str) -> Iterator[str]:
    for name, module in _wrappers(model):
        yield from (f"{name}.{key}" for key in module.adapter_state_dict_load_map(adapter_name).values())


def _names_of_other_adapters(model: nn.Module, adapter_name: str) -> set[str]:
    others = {other for _, module in _wrappers(model) for other in module._adapters if other != adapter_name}
    return {name for other in others for name in _names_of_wrappers(model, other)}


# ---------------------------------------------------------------------- embeddings


def names_of_embeddings(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Which of these are tensors of the base's input and output embeddings."""
    modules = {id(module) for module in embeddings_of(model)}
    prefixes = tuple(
        f"{name.removeprefix(FSDP)}."
        for name, module in model.named_modules(remove_duplicate=False)
        if id(module) in modules
    )
    return {name for name in names if name.startswith(prefixes)}


def embeddings_of(model: nn.Module) -> Iterator[nn.Module]:
    """The base's own input and output embeddings, below any adapters."""
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            module = getattr(model, getter)()
        except (AttributeError, NotImplementedError):
            continue
        if isinstance(module, AuxiliaryTrainingWrapper):
            module = module.original_module
        yield module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def is_resized(model: nn.Module, config: BaseSparseConfig) -> bool:
    """Whether the vocabulary has another size than that of the checkpoint that the model was read from."""
    own = getattr(model, "config", None)
    checkpoint = getattr(own, "name_or_path", None) or config.base_model_name_or_path
    if not isinstance(own, PretrainedConfig) or not checkpoint:
        return False
    try:
        original = type(own).from_pretrained(checkpoint, local_files_only=True)
    except (OSError, ValueError):
        return False
    return getattr(original, "vocab_size", None) != getattr(own, "vocab_size", None)


def _is_the_same(own: Tensor, found: Tensor) -> bool:
    """Whether a file repeats a tensor of the base, in the narrower of their dtypes.

    Tensors without memory and shards are not compared; the base keeps its own in any case.
    """
    if own.is_meta or isinstance(own, DTensor):
        return True
    dtype = min(own.dtype, found.dtype, key=lambda dtype: dtype.itemsize)
    return own.shape == found.shape and torch.equal(own.to(dtype), found.to(own.device, dtype))


# ---------------------------------------------------------------------- errors


def _refuse(names: list[str], model: nn.Module, config: BaseSparseConfig, base: Iterable[str]) -> NoReturn:
    more = f"; {len(names) - 1} more tensors do not belong to the adapter" if len(names) > 1 else ""
    raise ValueError(f"the adapter file has {names[0]}, {_what_it_is(names[0], model, config, base)}{more}")


def _what_it_is(name: str, model: nn.Module, config: BaseSparseConfig, base: Iterable[str]) -> str:
    layer, of_a_layer, _ = name.rpartition(f".{config.prefix()}")
    if name in base and (of_a_layer or ".modules_to_save." in name):
        return f"a tensor of another adapter of the model; {DAMAGED}"
    if name in base:
        return (
            "a weight of the base model, which such an adapter leaves as it is "
            f"(modules_to_save={config.modules_to_save!r}, bias={config.bias!r}); the file is damaged, or written to "
            "change the base unnoticed. A module in modules_to_save of adapter_config.json is loaded beside the base"
        )
    if not of_a_layer:
        return f"which is no tensor of this adapter; {DAMAGED}"
    modules = dict(model.named_modules())
    if layer not in modules:
        return "for a layer that this model does not have; the adapter was made for another base model"
    if isinstance(modules[layer], TunerLayer):
        return f"an unknown tensor of an adapted layer; {DAMAGED}"
    return (
        f"for a layer that the config leaves out (target_modules={config.target_modules!r}); load it with the "
        "adapter_config.json it was saved with"
    )
