"""The package's common format of sparse deltas: adapters of [`SparseConfig`][sparse_peft.SparseConfig].

Extraction, conversion, compositions of several methods and ``save_as_sparse`` write it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..registry import method_named
from ..support import Support
from ..tuners.base_config import BaseSparseConfig
from ..tuners.base_model import BaseSparseModel
from ..tuners.combination import combined_config
from ..tuners.delta import SparseDelta
from ..tuners.files.checks import values_on_disk
from ..tuners.support_recipe import SupportRecipe
from .files import PREFIX

ENTRIES = method_named("sparse")
BIAS_OF_LAYERS = f"{ENTRIES.peft_type.lower()}_only"  # trains the biases of the adapted layers


def named_tensors(tuner: type[BaseSparseModel], tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """``{layer: {name: tensor}}`` of a method under the names that they have in a file."""
    container = tuner.layer_cls.delta_container
    return {
        f"{PREFIX}{layer}.{container}.{name}": tensor
        for layer, found in tensors.items()
        for name, tensor in found.items()
    }


def sparse_state(support: Support, values: Tensor) -> SparseDelta:
    """A sparse delta with these values and a scale of 1, outside of any model."""
    recipe = SupportRecipe("random", support.nnz, 0, support.name)
    state = SparseDelta(support.shape, support.nnz, support.name, recipe, support)
    state.values.data = values
    return state


def sparse_adapter(
    like: Any, states: Mapping[str, SparseDelta], save_dtype: str = "float32"
) -> tuple[BaseSparseConfig, dict[str, Tensor]]:
    """The config and the file's tensors of an adapter with these sparse deltas.

    Args:
        like: config of an adapter of the same base model, whose other fields are taken over.
        states: ``{layer name: delta}``.
        save_dtype: of the values.

    Raises:
        ValueError: values that are not finite, or too large for ``save_dtype``.
    """
    dtype = getattr(torch, save_dtype)
    tensors = {
        name: {"values": values_on_disk(state().detach(), dtype, name), **state.file_tensors()}
        for name, state in states.items()
    }
    bias = getattr(like, "bias", "none")
    make_config: Any = ENTRIES.config_class  # scale is a field of methods with sparse deltas
    config: BaseSparseConfig = make_config(
        scale=1.0,
        weight_shapes={name: list(state.shape) for name, state in states.items()},
        base_model_name_or_path=like.base_model_name_or_path,
        revision=like.revision,
        task_type=like.task_type,
        target_parameters=getattr(like, "target_parameters", None),
        modules_to_save=like.modules_to_save,
        trainable_token_indices=getattr(like, "trainable_token_indices", None),
        bias=BIAS_OF_LAYERS if bias.endswith("_only") else bias,
    )
    tuner = ENTRIES.model_class
    config = combined_config(tuner, [config], tensors)
    config.save_dtype = save_dtype
    return config, named_tensors(tuner, tensors)
