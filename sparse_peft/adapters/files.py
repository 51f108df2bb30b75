"""Adapter folders in PEFT's layout, also of models without PEFT's wrapper.

``PeftModel`` and transformers' models save and load themselves. Others, such as diffusers' with an adapter from
``add_adapter`` or ``inject_adapter_in_model``, have no method for it.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import peft
from peft import PeftConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft import __version__ as peft_version
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..staging import staging_folder
from ..tuners.base_model import BaseSparseModel
from ..tuners.files.adapter_file import AdapterFile
from ..tuners.files.card import FRAMEWORK_HEADING, complete_card, new_card, write_card
from ..tuners.files.checks import DAMAGED, check_adapter_name, read_config_file, shapes_in_file
from ..tuners.files.refused_loads import undone_if_refused
from ..tuners.traversal import configs_of

# Prefix of the names in PeftModel's state dicts, and so in every adapter file.
PREFIX = "base_model.model."


class NoAdapterError(ValueError):
    """What was given as an adapter is none, or none of the kind that is wanted."""


def config_of(model: nn.Module, adapter_name: str) -> Any:
    """The config of one of the model's adapters.

    Raises:
        ValueError: it has none of this name.
    """
    configs = configs_of(model)
    if adapter_name not in configs:
        names = ", ".join(map(repr, configs)) or "none"
        raise ValueError(f"adapter_name={adapter_name!r}: the model's adapters are {names}")
    return configs[adapter_name]


def tensors_of(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """One adapter's tensors under the names that they have in a file."""
    state = peft.get_peft_model_state_dict(model, adapter_name=adapter_name)
    return {name if name.startswith(PREFIX) else f"{PREFIX}{name}": tensor for name, tensor in state.items()}


def write_adapter(
    folder: str | os.PathLike, config: PeftConfig, tensors: dict[str, Tensor], story: str | None = None
) -> None:
    """Write an adapter's folder, whole or not at all.

    Args:
        folder: made if need be.
        config: the adapter's.
        tensors: under the names that they have in a file.
        story: a sentence on where it comes from; with it a model card is written as well.
    """
    config = copy.copy(config)
    config.inference_mode = True
    with staging_folder(folder) as staging:
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(whole, staging / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        config.save_pretrained(os.fspath(staging))
        if story is not None:
            _write_card(staging, config, story)


def _write_card(folder: Path, config: PeftConfig, story: str) -> None:
    """Write a card like PEFT's with the adapter's origin."""
    base = config.base_model_name_or_path
    card = new_card(base, kind="Adapter")
    card.text += f"\n{story}\n\n{FRAMEWORK_HEADING}\n\n- PEFT {peft_version}\n"
    write_card(card, folder)
    complete_card(folder, set(), base)


def read_adapter(folder: str | os.PathLike) -> tuple[PeftConfig, dict[str, Tensor]]:
    """The config and tensors of an adapter's folder.

    Raises:
        NoAdapterError: there is no adapter in it.
        ValueError: it is damaged.
    """
    folder = Path(folder)
    config_path = folder / CONFIG_NAME
    if not config_path.is_file():
        raise NoAdapterError(f"{folder}: no {CONFIG_NAME} in it; the folder of an adapter is expected")
    peft_type = read_config_file(config_path).get("peft_type")
    config_classes: dict[object, type[PeftConfig]] = {kind.value: c for kind, c in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if not isinstance(peft_type, str) or peft_type not in config_classes:
        raise NoAdapterError(f"{config_path}: peft_type={peft_type!r} is no method that is known here; {DAMAGED}")
    shapes_in_file(folder)
    config = config_classes[peft_type].from_pretrained(os.fspath(folder))
    return config, read_tensors(folder / SAFETENSORS_WEIGHTS_NAME)


def read_tensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    if not Path(path).is_file():
        raise ValueError(f"{os.fspath(path)}: no such file; an adapter's folder has {SAFETENSORS_WEIGHTS_NAME} in it")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: no valid safetensors file ({error}); copy or download it again") from error


def save_adapter(model: nn.Module, folder: str | os.PathLike, adapter_name: str = "default") -> None:
    """Save one adapter of a model, with or without PEFT's wrapper; ``PeftModel.from_pretrained`` reads it as well.

    Args:
        model: the model that has the adapter, such as a pipeline's ``unet``.
        folder: made if need be; it gets ``adapter_config.json`` and ``adapter_model.safetensors``.
        adapter_name: which.

    Raises:
        ValueError: the model has no such adapter, or one with values that are not finite.

    Example:
        >>> import tempfile, torch
        >>> from peft import get_peft_model
        >>> from sparse_peft import SparseConfig
        >>> from sparse_peft.adapters import load_adapter, save_adapter
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> _ = get_peft_model(model, SparseConfig(density=0.05, target_modules=["0"]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_adapter(model, folder)
        ...     fresh = torch.nn.Sequential(torch.nn.Linear(64, 32))
        ...     load_adapter(fresh, folder)
        >>> fresh[0].support("default") == model[0].support("default")
        True
    """
    write_adapter(folder, config_of(model, adapter_name), tensors_of(model, adapter_name))


def load_adapter(
    model: nn.Module, folder: str | os.PathLike, adapter_name: str = "default", is_trainable: bool = False
) -> None:
    """Give a model an adapter from its folder, in place; the counterpart of
    [`save_adapter`][sparse_peft.adapters.save_adapter].

    Args:
        model: the base model, such as a pipeline's ``unet``, or one that has other adapters already.
        folder: as written by [`save_adapter`][sparse_peft.adapters.save_adapter] or by PEFT.
        adapter_name: the name it gets.
        is_trainable: whether training is to go on.

    Raises:
        ValueError: no adapter in the folder, a damaged one, or one for another base model; the model is as before.

    Example:
        >>> import tempfile, torch
        >>> from peft import get_peft_model
        >>> from sparse_peft import SparseConfig
        >>> from sparse_peft.adapters import load_adapter
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(64, 32)), SparseConfig(target_modules=["0"]))
        >>> fresh = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save_pretrained(folder)
        ...     load_adapter(fresh, folder, "style")
        >>> fresh[0].active_adapters
        ['style']
    """
    check_adapter_name(adapter_name)
    config, tensors = read_adapter(folder)
    config.inference_mode = not is_trainable
    with undone_if_refused(model, adapter_name, AdapterFile(os.fspath(folder), tensors=tensors)):
        _make_adapter(model, config, adapter_name)
        _fill_adapter(model, tensors, adapter_name, os.fspath(folder))


def _make_adapter(model: Any, config: PeftConfig, adapter_name: str) -> None:
    if hasattr(model, "_hf_peft_config_loaded"):
        model.add_adapter(config, adapter_name)  # diffusers and transformers keep a record of their adapters
    else:
        inject_adapter_in_model(config, model, adapter_name)
    if config.inference_mode:  # diffusers makes every adapter that it activates trainable
        for layer in BaseSparseModel.sparse_layers(model):
            if adapter_name in layer.deltas:
                layer.deltas[adapter_name].requires_grad_(False)


def _fill_adapter(model: nn.Module, tensors: dict[str, Tensor], adapter_name: str, folder: str) -> None:
    state = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    result: Any = set_peft_model_state_dict(model, state, adapter_name=adapter_name)
    if result.unexpected_keys:
        raise ValueError(
            f"{folder}: the model has no place for {result.unexpected_keys[0]} and {len(result.unexpected_keys) - 1} "
            "more tensors of the adapter; it was made for another base model"
        )
