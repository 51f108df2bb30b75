"""A load that is refused leaves the model as it was."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.functional import delete_adapter
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.integrations.peft import PeftAdapterMixin

from ..base_config import BaseSparseConfig
from ..base_layer import TunerLayer
from ..targets import release_empty_experts
from ..traversal import configs_of, modules_beside_adapters
from .accepted_tensors import Entries, named_states
from .adapter_file import AdapterFile, reading
from .checks import check_values
from .wrapped import wrap_once

Wrapper = TunerLayer | AuxiliaryTrainingWrapper


@contextmanager
def undone_if_refused(model: nn.Module, adapter_name: str, file: AdapterFile) -> Iterator[None]:
    """Inside, an adapter is made and its file loaded; after an error the model is as it was before.

    Weights that the adapter's method dropped for good (``mode="replace"``, ``mode="pretrain"``) do not come back.

    Args:
        model: with or without PEFT's wrapper.
        adapter_name: the adapter's. One that the model has already, whose file is loaded again, stays.
        file: where its tensors come from.
    """
    with reading(file), _undone_if_refused(model, adapter_name):
        yield


@contextmanager
def _undone_if_refused(model: nn.Module, adapter_name: str) -> Iterator[None]:
    if adapter_name in configs_of(model):
        yield
        return
    # hundreds of adapters may be there already
    modules = list(modules_beside_adapters(model))
    wrappers = {id(module) for module in modules if isinstance(module, Wrapper)}
    parameters = [p for module in modules for p in module._parameters.values() if p is not None]
    trained = [(parameter, parameter.requires_grad) for parameter in parameters]
    try:
        yield
    except BaseException:
        config = configs_of(model).get(adapter_name)
        if isinstance(config, BaseSparseConfig):
            delete_adapter(model, adapter_name, config.prefix())
            _forget_config(model, adapter_name)
            _unwrap(model, wrappers)
            for parameter, requires_grad in trained:
                parameter.requires_grad_(requires_grad)
        raise


def _forget_config(model: nn.Module, adapter_name: str) -> None:
    for module in list(model.modules()):
        configs = module.__dict__.get("peft_config")
        if isinstance(configs, dict):
            configs.pop(adapter_name, None)
            if not configs and "_hf_peft_config_loaded" in module.__dict__:
                del module.peft_config
                module.__dict__["_hf_peft_config_loaded"] = False


def _unwrap(model: nn.Module, kept: set[int]) -> None:
    """Put the model's own modules back in place of wrappers, other than those to be kept."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if not isinstance(child, Wrapper) or id(child) in kept:
                continue
            own = child.get_base_layer() if isinstance(child, TunerLayer) else child.original_module
            if not isinstance(child, TunerLayer) or "weight" in child.base_parameters:
                parent._modules[name] = own
    release_empty_experts(model)


@contextmanager
def _base_kept(model: nn.Module, adapter_name: str) -> Iterator[Entries]:
    """Inside, transformers loads an adapter; after it the base has its own tensors again.

    transformers replaces all tensors of the model that a file has under their names. Those of the base are afterwards
    in the dictionary, by name.
    """
    before = [(module, {**module._parameters, **module._buffers}) for module in modules_beside_adapters(model)]
    replaced: Entries = {}
    try:
        yield replaced
    finally:
        if isinstance(configs_of(model).get(adapter_name), BaseSparseConfig):
            replaced |= _put_back(model, before)


def _put_back(model: nn.Module, before: list[tuple[nn.Module, dict[str, Tensor | None]]]) -> Entries:
    """Give modules the tensors that they had, and return those that were in their place."""
    names = {id(module): name for name, module in model.named_modules()}
    replaced: Entries = {}
    for module, tensors in before:
        for leaf, tensor in tensors.items() if id(module) in names else ():
            now: Any = getattr(module, leaf, tensor)
            if now is not tensor:
                replaced[f"{names[id(module)]}.{leaf}".removeprefix(".")] = now
                setattr(module, leaf, tensor)
    return replaced


def _check_loaded(
    model: nn.Module, adapter_name: str, replaced: Entries, unexpected: Iterable[str], missing: Iterable[str]
) -> None:
    """Check what transformers loaded as a file's tensors are checked, except for positions.

    Args:
        model: that has the adapter.
        adapter_name: its name.
        replaced: tensors of the base that the file has; those that may replace the base's are put in place.
        unexpected: names of the file's tensors that the model lacks.
        missing: names of tensors that the file lacks.

    Raises:
        ValueError: names a tensor that is missing or none of the adapter's, or a layer whose values are not finite.
    """
    config = configs_of(model)[adapter_name]
    tuner: Any = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
    unknown = {tuner._remove_adapter_name_from_key(name, adapter_name): torch.empty(0) for name in unexpected}
    accepted = replaced | unknown
    tuner.accept_tensors(accepted, model, config, adapter_name)
    for name in replaced.keys() & accepted.keys():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, replaced[name])
    for key, layer, state in named_states(model, adapter_name):
        lacking = [name for name in (*state._parameters, *state.file_buffers()) if f"{key}{name}" in missing]
        state._required(**dict.fromkeys(lacking))
        for parameter in state.parameters():
            check_values(parameter, layer.name, "load")


def guard_refused_loads() -> None:
    """Make PEFT's and transformers' loads leave the model as it was if a file of this package is refused.

    Both register the adapter before they read the file, and offer no hook around the load.
    """
    wrap_once(PeftModel, "from_pretrained", _load_first)
    wrap_once(PeftModel, "load_adapter", _load_another)
    wrap_once(PeftAdapterMixin, "load_adapter", _load_by_transformers)


def _load_first(
    load: Callable[..., PeftModel],
    cls: type[PeftModel],
    model: nn.Module,
    model_id: str | os.PathLike,
    adapter_name: str = "default",
    *args: Any,
    **kwargs: Any,
) -> PeftModel:
    """Leave the base model as it was if a file is refused."""
    with undone_if_refused(model, adapter_name, AdapterFile(os.fspath(model_id), kwargs)):
        return load(cls, model, model_id, adapter_name, *args, **kwargs)


def _load_another(
    load: Callable[..., Any],
    model: PeftModel,
    model_id: str | os.PathLike,
    adapter_name: str,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Leave a model with adapters as it was if a file is refused."""
    with undone_if_refused(model, adapter_name, AdapterFile(os.fspath(model_id), kwargs)):
        return load(model, model_id, adapter_name, *args, **kwargs)


def _load_by_transformers(load: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """Leave a transformers model as it was if a file is refused."""
    given = inspect.signature(load).bind(model, *args, **kwargs).arguments
    name = given.get("adapter_name") or "default"
    with undone_if_refused(model, name, _file_for_transformers(given)):
        with _base_kept(model, name) as replaced:
            info = load(model, *args, **kwargs)
        if isinstance(configs_of(model).get(name), BaseSparseConfig):
            unexpected, missing = getattr(info, "unexpected_keys", ()), getattr(info, "missing_keys", ())
            _check_loaded(model, name, replaced, unexpected, missing)
        return info


def _file_for_transformers(given: Mapping[str, Any]) -> AdapterFile:
    """The file that transformers' ``load_adapter`` reads, from the arguments of its call."""
    config, further = given.get("load_config"), given.get("kwargs", {})
    source = given.get("peft_model_id") or getattr(config, "pretrained_model_name_or_path", None)
    options = {
        **(getattr(config, "download_kwargs", None) or {}),
        **(further.get("download_kwargs") or {}),
        **(given.get("adapter_kwargs") or {}),
        "local_files_only": given.get("local_files_only") or None,
    }
    return AdapterFile(os.fspath(source or "the state dict"), options, given.get("adapter_state_dict"))
