"""A kernelised delta as the plain sparse one that it is once training is over."""

from __future__ import annotations

import os

from torch import Tensor, nn

from ..tuners.base_model import BaseSparseModel
from ..tuners.snella import SnellaConfig, SnellaLinear
from ..tuners.sparse import SparseConfig
from .files import config_of, tensors_of, write_adapter
from .offline_adapter import sparse_config, sparse_state, sparse_tensors


def to_sparse(model: nn.Module, adapter_name: str = "default") -> tuple[SparseConfig, dict[str, Tensor]]:
    """A [`SnellaConfig`][sparse_peft.SnellaConfig] adapter as a sparse delta: config and tensors of a file.

    Layers that keep no entry are left out.

    Raises:
        ValueError: no such adapter, one of another method, or one that keeps nothing at all.
    """
    config = config_of(model, adapter_name)
    if not isinstance(config, SnellaConfig):
        raise ValueError(
            f"adapter_name={adapter_name!r} is of {type(config).__name__}; only SnellaConfig's are written as sparse "
            "deltas"
        )
    # what else is in the file, such as a classifier that trained whole
    rest = {
        name: tensor
        for name, tensor in tensors_of(model, adapter_name).items()
        if SnellaLinear.delta_container not in name
    }
    entries = {
        layer.name: layer.settled(adapter_name).as_sparse()
        for layer in BaseSparseModel.sparse_layers(model)
        if adapter_name in layer.deltas
    }
    states = {name: sparse_state(found.support, found.values) for name, found in entries.items() if found.support.nnz}
    if not states:
        raise ValueError(f"adapter_name={adapter_name!r}: no layer keeps any entry, there is nothing to write")
    return sparse_config(config, states), {**sparse_tensors(states), **rest}


def save_as_sparse(model: nn.Module, folder: str | os.PathLike, adapter_name: str = "default") -> SparseConfig:
    """Write a SNELL or SNELLA adapter as a folder with a [`SparseConfig`][sparse_peft.SparseConfig] adapter.

    What is loaded from it computes the same outputs up to rounding, without kernels, and trains on at the positions
    that were kept. Values are float32.

    Args:
        model: the model that has the adapter.
        folder: made if need be.
        adapter_name: which.

    Returns:
        The sparse delta's config.

    Raises:
        ValueError: as [`to_sparse`][sparse_peft.adapters.to_sparse].
    """
    config, tensors = to_sparse(model, adapter_name)
    write_adapter(folder, config, tensors, "A SNELL adapter, written with `sparse_peft.adapters.save_as_sparse`.")
    return config
