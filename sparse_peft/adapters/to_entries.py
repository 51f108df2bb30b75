"""A trained adapter of any method as a plain sparse delta."""

from __future__ import annotations

import os

from torch import Tensor, nn

from ..tuners.base_config import BaseSparseConfig
from ..tuners.base_model import BaseSparseModel
from .entry_format import sparse_adapter, sparse_state
from .files import config_of, tensors_of, write_adapter


def to_sparse(model: nn.Module, adapter_name: str = "default") -> tuple[BaseSparseConfig, dict[str, Tensor]]:
    """An adapter whose delta consists of entries, such as SNELLA's, as a sparse delta: config and tensors of a file.

    The config is a [`SparseConfig`][sparse_peft.SparseConfig].

    Layers without entries are left out.

    Raises:
        ValueError: no such adapter, one whose delta has no sparse form, or one without any entry.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from sparse_peft import SnellaConfig
        >>> from sparse_peft.adapters import to_sparse
        >>> config = SnellaConfig(r=2, sparsity=0.9, init_weights=False, target_modules=["0"])
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(64, 32)), config)
        >>> made, tensors = to_sparse(model)
        >>> type(made).__name__, sorted(name.rpartition(".")[2] for name in tensors)
        ('SparseConfig', ['cols', 'row_counts', 'values'])
    """
    config = config_of(model, adapter_name)
    layers = [layer for layer in BaseSparseModel.sparse_layers(model) if adapter_name in layer.deltas]
    entries = {layer.name: layer.settled(adapter_name).as_sparse() for layer in layers}
    states = {
        name: sparse_state(found.support, found.values.float()) for name, found in entries.items() if found.support.nnz
    }
    if not states:
        raise ValueError(f"adapter_name={adapter_name!r}: no layer keeps any entry, there is nothing to write")
    made, tensors = sparse_adapter(config, states)
    # other tensors of the file, such as a classifier saved whole
    container = layers[0].delta_container
    rest = {name: t for name, t in tensors_of(model, adapter_name).items() if container not in name}
    return made, {**tensors, **rest}


def save_as_sparse(model: nn.Module, folder: str | os.PathLike, adapter_name: str = "default") -> BaseSparseConfig:
    """Write an adapter whose delta consists of entries as a folder with a
    [`SparseConfig`][sparse_peft.SparseConfig] adapter.

    For SNELL and SNELLA: the loaded adapter computes the same outputs up to rounding, without distances, and trains on
    at the positions that were kept. Values are float32.

    Args:
        model: the model that has the adapter.
        folder: made if need be.
        adapter_name: which.

    Returns:
        The sparse delta's config.

    Raises:
        ValueError: as [`to_sparse`][sparse_peft.adapters.to_sparse].

    Example:
        >>> import tempfile, torch
        >>> from peft import PeftConfig, get_peft_model
        >>> from sparse_peft import SnellaConfig
        >>> from sparse_peft.adapters import save_as_sparse
        >>> config = SnellaConfig(r=2, sparsity=0.9, init_weights=False, target_modules=["0"])
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(64, 32)), config)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = save_as_sparse(model, folder)
        ...     type(PeftConfig.from_pretrained(folder)).__name__
        'SparseConfig'
    """
    config, tensors = to_sparse(model, adapter_name)
    write_adapter(folder, config, tensors, "A sparse delta, written with `sparse_peft.adapters.save_as_sparse`.")
    return config
