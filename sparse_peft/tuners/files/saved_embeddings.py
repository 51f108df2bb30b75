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
from ..base_layer import TunerLayer
from ..traversal import configs_of
from .accepted_tensors import is_resized
from .wrapped import wrap_once

NAME = "get_peft_model_state_dict"
OWNERS = (peft, peft.utils, peft.utils.save_and_load, peft.peft_model, peft.functional)


def guard_saved_embeddings() -> None:
    """Make PEFT leave embeddings with trained entries out of files, unless the vocabulary was resized.

    PEFT offers no hook for that, and its ``"auto"`` would put the whole base weights beside kilobytes of values. With
    ``save_embedding_layers=True`` they are saved as before.
    """
    for owner in OWNERS:
        wrap_once(owner, NAME, _without_whole_embeddings)


def _without_whole_embeddings(get: Callable[..., dict[str, Tensor]], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """Save an adapter that targets embeddings without their base weights."""
    call = inspect.signature(get).bind(*args, **kwargs)
    call.apply_defaults()
    given = call.arguments
    config = configs_of(given["model"]).get(given["adapter_name"])
    if (
        given["save_embedding_layers"] == "auto"
        and isinstance(config, BaseSparseConfig)
        and _has_trained_embeddings(given["model"])
    ):
        given["save_embedding_layers"] = is_resized(given["model"], config)
    return get(*call.args, **call.kwargs)


def _has_trained_embeddings(model: nn.Module) -> bool:
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            module = getattr(model, getter)()
        except (AttributeError, NotImplementedError):
            continue
        if isinstance(module, TunerLayer):
            return True
    return False
