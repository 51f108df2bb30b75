"""Embeddings beside an adapter: PEFT saves those that an adapter targets whole, and ours leave them as they were."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import peft
import peft.functional
import peft.peft_model
import peft.utils
import peft.utils.save_and_load
from torch import Tensor, nn

from ..base_config import BaseSparseConfig
from ..traversal import configs_of, tuner_layers
from .accepted_tensors import embeddings_of, is_resized, names_of_embeddings
from .wrapped import wrap_once

NAME = "get_peft_model_state_dict"
OWNERS = (peft, peft.utils, peft.utils.save_and_load, peft.peft_model, peft.functional)


def guard_saved_embeddings() -> None:
    """Make PEFT leave embeddings with trained entries out of files, unless the vocabulary was resized.

    PEFT offers no hook for that, and its ``"auto"`` would put the whole base weights beside kilobytes of values. Of a
    resized vocabulary it would save the targeted embeddings, and not the others. With ``save_embedding_layers=True``
    or ``False`` it decides alone.
    """
    for owner in OWNERS:
        wrap_once(owner, NAME, _without_whole_embeddings)


def _without_whole_embeddings(get: Callable[..., dict[str, Tensor]], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """Save an adapter that targets embeddings without their base weights, or with all of a resized vocabulary."""
    call = inspect.signature(get).bind(*args, **kwargs)
    call.apply_defaults()
    given = call.arguments
    config = configs_of(given["model"]).get(given["adapter_name"])
    if given["save_embedding_layers"] != "auto" or not isinstance(config, BaseSparseConfig):
        return get(*args, **kwargs)
    model = given["model"]
    if not _has_trained_embeddings(model):
        return get(*args, **kwargs)
    given["save_embedding_layers"] = False
    found = get(*call.args, **call.kwargs)
    return found | _whole_embeddings(model, given["state_dict"]) if is_resized(model, config) else found


def _has_trained_embeddings(model: nn.Module) -> bool:
    embeddings = {id(module) for module in embeddings_of(model)}
    return any(id(layer.get_base_layer()) in embeddings for layer in tuner_layers(model))


def _whole_embeddings(model: nn.Module, state: dict[str, Tensor] | None) -> dict[str, Tensor]:
    state = model.state_dict() if state is None else state
    return {name: state[name] for name in names_of_embeddings(model, state) if ".original_module." not in name}
