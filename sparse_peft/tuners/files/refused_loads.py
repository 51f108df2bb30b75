"""A load that is refused leaves the model as it was."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from peft.functional import delete_adapter
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..base_config import BaseSparseConfig
from ..base_layer import TunerLayer
from ..traversal import configs_of, modules_beside_adapters

Wrapper = TunerLayer | AuxiliaryTrainingWrapper


@contextmanager
def undone_if_refused(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """Inside, an adapter is made and its file loaded; after an error the model is as it was before.

    Weights that the adapter's method dropped for good (``mode="replace"``, ``mode="pretrain"``) do not come back.

    Args:
        model: with or without PEFT's wrapper.
        adapter_name: the adapter's. One that the model has already, whose file is loaded again, stays.
    """
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
    """Put the model's own modules back in the place of wrappers, other than those to be kept."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if not isinstance(child, Wrapper) or id(child) in kept:
                continue
            own = child.get_base_layer() if isinstance(child, TunerLayer) else child.original_module
            if not isinstance(child, TunerLayer) or "weight" in own._parameters:
                parent._modules[name] = own


def guard_refused_loads() -> None:
    """Make ``PeftModel.load_adapter`` take back an adapter of this package whose file it refuses.

    PEFT registers the adapter before it reads the file, and offers no hook around the load.
    """
    load = PeftModel.load_adapter
    if getattr(load, "takes_back", False):
        return

    @functools.wraps(load)
    def load_or_take_back(self: PeftModel, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        with undone_if_refused(self, adapter_name):
            return load(self, model_id, adapter_name, *args, **kwargs)

    load_or_take_back.takes_back = True  # type: ignore[attr-defined]
    PeftModel.load_adapter = load_or_take_back  # type: ignore[method-assign]
