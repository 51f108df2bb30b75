"""Sparse adapters read from their folders, without their base model.

PEFT's own loading fills layers that have the recorded shapes and no memory. The files are thus checked as for a real
model, by the same code.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from peft import inject_adapter_in_model, set_peft_model_state_dict
from torch import Tensor, nn

from ..constraints import Count, validated
from ..registry import method_of
from ..support import Support
from ..tuners.base_config import BaseSparseConfig
from ..tuners.base_layer import TunerLayer
from ..tuners.base_model import BaseSparseModel
from ..tuners.base_state import TrainedState
from ..tuners.delta import SparseDelta
from .delta_matrix import DeltaMatrix
from .entry_format import ENTRIES, sparse_adapter, sparse_state
from .files import PREFIX, NoAdapterError, read_adapter

MAX_WEIGHT = 2**48  # entries, more than any weight has


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter in its folder.

    Attributes:
        folder: where it was read.
        config: its config.
        states: ``{layer name: trained state}``.
        rest: tensors beside the layers' states, by names in the file: modules saved whole, biases.
        in_dims: ``{layer name: dimension of the stored weight that is the input's}``, as far as the file shows it: a
            transformers ``Conv1D`` with a sparse delta alone has 1, too.
    """

    folder: str
    config: BaseSparseConfig
    states: dict[str, TrainedState]
    rest: dict[str, Tensor]
    in_dims: dict[str, int]

    def delta(self, layer: str) -> DeltaMatrix:
        """A layer's delta, for numbers about it."""
        return DeltaMatrix(self.states[layer], self.in_dims[layer])

    @property
    def tuner(self) -> type[BaseSparseModel]:
        """The method's model class."""
        return method_of(self.config).model_class

    @property
    def is_sparse(self) -> bool:
        """Whether its deltas consist of entries alone."""
        return all(state.is_sparse for state in self.states.values())


def check_shape(shape: Any, layer: str, source: str) -> tuple[int, int]:
    """``(rows, cols)`` out of a file, before anything is made of that size.

    Raises:
        ValueError: it is no shape of a matrix.
    """
    try:
        rows, cols = validated(f"shape of layer {layer}", shape, list[Count])
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{source}: layer {layer} has the shape {shape!r}; [rows, cols] of a weight is expected"
        ) from error
    if rows * cols > MAX_WEIGHT:
        raise ValueError(f"{source}: layer {layer} has the shape {shape!r}, larger than any weight; it is damaged")
    return rows, cols


def read_sparse(folder: str | os.PathLike) -> tuple[BaseSparseConfig, dict[str, Tensor]]:
    """The config and tensors of a sparse adapter's folder, that its base model can be given.

    Raises:
        NoAdapterError: no adapter of this package.
        ValueError: one that replaces its base model's weights, or a damaged one.
    """
    folder = os.fspath(folder)
    config, tensors = read_adapter(folder)
    if not isinstance(config, BaseSparseConfig):
        kind = getattr(config.peft_type, "value", config.peft_type)
        cure = {
            "LORA": "PEFT itself loads and merges it, and combines several by add_weighted_adapter with "
            "combination_type='cat', which is exact, or 'svd'",
            "SHIRA": "sparse_peft.adapters.convert makes a sparse delta of it",
            "SUPERTUNING": "sparse_peft.adapters.convert makes a sparse delta of it",
        }
        raise NoAdapterError(
            f"{folder}: a sparse adapter is expected, this is {kind}" + (f"; {cure[kind]}" if kind in cure else "")
        )
    if method_of(config).model_class.saves_base_weights(config):
        raise ValueError(
            f"{folder}: this {type(config).__name__} adapter is the weights themselves, not a change of a base "
            "model's; load it and merge_and_unload()"
        )
    return config, tensors


def read_stored(folder: str | os.PathLike) -> StoredAdapter:
    """Read a sparse adapter's folder.

    Raises:
        ValueError: as ``read_sparse``, or an adapter whose delta depends on its base's weights; names the layer.

    Example:
        >>> import tempfile, torch
        >>> from peft import get_peft_model
        >>> from sparse_peft import SparseConfig
        >>> def save(folder, seed):
        ...     config = SparseConfig(density=0.05, seed=seed, init_weights=False, target_modules=["0"])
        ...     get_peft_model(torch.nn.Sequential(torch.nn.Linear(64, 32)), config).save_pretrained(folder)
        >>> from sparse_peft.adapters import read_stored, supports_of
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(folder, seed=0)
        ...     adapter = read_stored(folder)
        >>> {name: support.nnz for name, support in supports_of(adapter).items()}
        {'0': 102}
    """
    folder = os.fspath(folder)
    config, tensors = read_sparse(folder)
    tuner = method_of(config).model_class
    if tuner.needs_base_weights:
        raise ValueError(
            f"{folder}: what an adapter of {type(config).__name__} adds is known on its base model only; load it "
            "there with PeftModel.from_pretrained, or write the merged model with sparse_peft.adapters.export"
        )
    marker = f".{tuner.layer_cls.delta_container}."
    tensors_of, rest = _by_layer(tensors, marker)
    shapes = config.weight_shapes or {}
    if set(shapes) != set(tensors_of) or not tensors_of:
        odd = sorted(set(shapes) ^ set(tensors_of)) or ["none at all"]
        raise ValueError(
            f"{folder}: adapter_config.json and the adapter's file have different layers, such as {odd[0]}; it is "
            "damaged or was edited: save or download it again"
        )
    skeletons = {}
    for layer, found in tensors_of.items():
        shape = check_shape(shapes[layer], layer, f"{folder}: weight_shapes")
        skeletons[layer] = tuner.skeleton_layer(config, layer, shape, found)
    layers = _load(config, tuner, skeletons, tensors_of)
    states = {name: layer.deltas["default"] for name, layer in layers.items()}
    return StoredAdapter(folder, config, states, rest, {name: layer.product.in_dim for name, layer in layers.items()})


def _by_layer(tensors: Mapping[str, Tensor], marker: str) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """``{layer: {name: tensor}}`` of a file, and the tensors beside the layers."""
    layers: dict[str, dict[str, Tensor]] = {}
    rest = {}
    for name, tensor in tensors.items():
        layer, found, part = name.removeprefix(PREFIX).rpartition(marker)
        if found:
            layers.setdefault(layer, {})[part] = tensor
        else:
            rest[name] = tensor
    return layers, rest


def _skeleton_model(layers: Mapping[str, nn.Module]) -> nn.Module:
    """A model of these layers alone, under their names."""
    root = nn.Module()
    for name, layer in layers.items():
        *path, last = name.split(".")
        parent = root
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        if last in parent._modules or type(parent) is not nn.Module:
            raise ValueError(f"layer {name}: it lies inside another layer of the adapter; its file is damaged")
        parent.add_module(last, layer)
    return root


def _load(
    config: BaseSparseConfig,
    tuner: type[BaseSparseModel],
    skeletons: dict[str, nn.Module],
    tensors: dict[str, dict[str, Tensor]],
) -> dict[str, TunerLayer]:
    """Put the tensors into layers around the skeletons, as PEFT does for a real model."""
    config = replace(
        config,
        target_modules=list(skeletons),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        modules_to_save=None,
        trainable_token_indices=None,
        bias="none",
        inference_mode=True,
    )
    model = _skeleton_model(skeletons)
    marker = f".{tuner.layer_cls.delta_container}."
    state_dict = {f"{layer}{marker}{part}": t for layer, found in tensors.items() for part, t in found.items()}
    entries = tuner.file_sizes(state_dict) or {}
    lacking = [layer for layer in skeletons if layer not in entries]
    if lacking:
        raise ValueError(f"layer {lacking[0]}: the adapter's file has no values for it; save or download it again")
    inject_adapter_in_model(config, model, state_dict=state_dict)
    set_peft_model_state_dict(model, dict(state_dict))
    return {layer.name: layer for layer in BaseSparseModel.sparse_layers(model)}


def entrywise(adapter: StoredAdapter) -> StoredAdapter:
    """A sparse adapter of any method as one of [`SparseConfig`][sparse_peft.SparseConfig].

    Raises:
        ValueError: its deltas are not sparse.
    """
    if method_of(adapter.config) is ENTRIES:
        return adapter
    states = entries_of(adapter)
    config, _ = sparse_adapter(adapter.config, states)
    return replace(adapter, config=config, states=dict(states))


def entries_of(adapter: StoredAdapter) -> dict[str, SparseDelta]:
    """``{layer name: its delta}`` of a sparse adapter of any method.

    Raises:
        ValueError: its deltas are not sparse.
    """
    states = {}
    for name, state in adapter.states.items():
        try:
            entries = state.as_sparse()
        except ValueError as error:
            kind = type(adapter.config).__name__
            raise ValueError(f"{adapter.folder}: the deltas of {kind} are not sparse: {error}") from error
        support = Support(entries.support.shape, entries.support.indices, validate=False, name=name)
        states[name] = sparse_state(support, entries.values.float())
    return states
