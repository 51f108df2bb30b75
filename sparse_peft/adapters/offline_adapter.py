"""Sparse adapters out of their folders, without the base model they belong to.

PEFT's own loading puts an adapter's states into layers; here the layers are stand-ins that have the recorded shapes
and no memory. So what is loaded is checked as it is for a real model, and no second reader of files is needed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import torch
from peft import inject_adapter_in_model, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..support import Support
from ..tuners.base_config import BaseSparseConfig
from ..tuners.base_layer import TunerLayer
from ..tuners.base_model import BaseSparseModel
from ..tuners.base_state import TrainedState
from ..tuners.combination import combined_config
from ..tuners.delta import SparseDelta
from ..tuners.sparse import SparseConfig, SparseModel
from ..tuners.support_recipe import SupportRecipe
from .delta_matrix import DeltaMatrix
from .files import PREFIX, read_adapter

MAX_WEIGHT = 2**48  # entries, far beyond any weight there is


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter as its folder has it.

    Attributes:
        folder: where it was read.
        config: its config.
        states: ``{layer name: trained state}``.
        rest: what is stored beside the layers' states: modules that were saved whole, biases; by names in the file.
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
        return PEFT_TYPE_TO_TUNER_MAPPING[self.config.peft_type]

    @property
    def is_sparse(self) -> bool:
        """Whether its deltas are sparse, and nothing else is added to the weights."""
        return all(state.is_sparse for state in self.states.values())


def named_tensors(tuner: type[BaseSparseModel], tensors: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """``{layer: {name: tensor}}`` of a method under the names that they have in a file."""
    container = tuner.layer_cls.delta_container
    return {
        f"{PREFIX}{layer}.{container}.{name}": tensor
        for layer, found in tensors.items()
        for name, tensor in found.items()
    }


def check_shape(shape: Any, layer: str, source: str) -> tuple[int, int]:
    """``(rows, cols)`` out of a file, before anything is made of that size.

    Raises:
        ValueError: it is no shape of a matrix.
    """
    whole = isinstance(shape, (list, tuple)) and len(shape) == 2
    if not whole or any(isinstance(n, bool) or not isinstance(n, Integral) or n < 1 for n in shape):
        raise ValueError(f"{source}: layer {layer} has the shape {shape!r}; [rows, cols] of a weight is expected")
    rows, cols = int(shape[0]), int(shape[1])
    if rows * cols > MAX_WEIGHT:
        raise ValueError(f"{source}: layer {layer} has the shape {shape!r}, larger than any weight; it is damaged")
    return rows, cols


def read_sparse(folder: str | os.PathLike) -> tuple[BaseSparseConfig, dict[str, Tensor]]:
    """The config and tensors of a sparse adapter's folder, that its base model can be given.

    Raises:
        ValueError: no adapter of this package, one that takes its base's place (SLTrain's ``mode="pretrain"``), or a
            damaged one.
    """
    folder = os.fspath(folder)
    config, tensors = read_adapter(folder)
    if not isinstance(config, BaseSparseConfig):
        kind = getattr(config.peft_type, "value", config.peft_type)
        cure = {
            "LORA": "LoRA's factors are not combined one by one, mean(B) mean(A) is not mean(B A): load the adapters "
            "and use PEFT's add_weighted_adapter with combination_type='cat', which is exact, or 'svd'",
            "SHIRA": "sparse_peft.adapters.convert makes a sparse delta of it",
            "SUPERTUNING": "sparse_peft.adapters.convert makes a sparse delta of it",
        }
        raise ValueError(
            f"{folder}: a sparse adapter is expected, this is {kind}" + (f"; {cure[kind]}" if kind in cure else "")
        )
    if not hasattr(config, "weight_shapes"):
        raise ValueError(
            f"{folder}: what {type(config).__name__} adapters change depends on more than their files; load it on its "
            "base model and merge_and_unload()"
        )
    if getattr(config, "mode", None) == "pretrain":
        raise ValueError(
            f"{folder}: an adapter of mode='pretrain' is the weights themselves, not a change of a base model's; load "
            "it and merge_and_unload()"
        )
    return config, tensors


def read_stored(folder: str | os.PathLike) -> StoredAdapter:
    """Read a sparse adapter's folder.

    Raises:
        ValueError: as ``read_sparse``, or a method that is nothing without its base's weights; names the layer.
    """
    folder = os.fspath(folder)
    config, tensors = read_sparse(folder)
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
    if tuner.needs_base_weights:
        raise ValueError(
            f"{folder}: what an adapter of {type(config).__name__} adds is known on its base model only; load it "
            "there with PeftModel.from_pretrained, or write the merged model with sparse_peft.adapters.export"
        )
    marker = f".{tuner.layer_cls.delta_container}."
    states, rest = {}, {}
    for name, tensor in tensors.items():
        layer, found, part = name.removeprefix(PREFIX).rpartition(marker)
        if found:
            states.setdefault(layer, {})[part] = tensor
        else:
            rest[name] = tensor
    shapes = config.weight_shapes or {}
    if set(shapes) != set(states) or not states:
        odd = sorted(set(shapes) ^ set(states)) or ["none at all"]
        raise ValueError(
            f"{folder}: adapter_config.json and the adapter's file have different layers, such as {odd[0]}; it is "
            "damaged or was edited: save or download it again"
        )
    layers = {}
    for layer, found in states.items():
        shape = check_shape(shapes[layer], layer, f"{folder}: weight_shapes")
        layers[layer] = _stand_in(layer, shape, found, (getattr(config, "sides", None) or {}).get(layer), config)
    loaded = _load(config, layers, states, marker)
    in_dims = {name: layer.product.in_dim for name, layer in loaded.items()}
    return StoredAdapter(
        folder, config, {name: layer.deltas["default"] for name, layer in loaded.items()}, rest, in_dims
    )


def _weightless(module: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    module.weight = nn.Parameter(torch.empty(1, device="cpu").expand(shape), requires_grad=False)
    return module


def _stand_in(
    layer: str, shape: tuple[int, int], tensors: dict[str, Tensor], side: str | None, config: BaseSparseConfig
) -> nn.Module:
    """A layer of the recorded shape without memory, of the kind that the adapter's tensors fit."""
    rows, cols = shape
    in_dim, taps = 1, 1
    if {"A", "B"} <= set(tensors):
        # nothing is made of a size that the file does not have
        down, up = tensors["A"], tensors["B"]
        rank = tensors["gate"].numel() if "gate" in tensors else config.r
        sides = (down.shape[-2], up.shape[-2]) if down.ndim == 3 == up.ndim else (down.shape[-1], up.shape[0])
        in_dim = 1 if sides[0] == cols else 0
        if sides != (shape[in_dim], shape[1 - in_dim]) or (down.numel(), up.numel()) != tuple(rank * n for n in sides):
            raise ValueError(
                f"layer {layer}: factors of shapes {tuple(down.shape)} and {tuple(up.shape)} for a weight of "
                f"{rows} x {cols} and rank {rank}; the adapter's file is damaged: save or download it again"
            )
    elif side is not None:
        dim = 0 if "rows" in tensors else 1
        channels, values = tensors.get(("rows", "columns")[dim]), tensors.get("values")
        in_dim = dim if side == "in" else 1 - dim
        if channels is not None and values is not None and channels.numel() and dim == 1:
            taps = max(1, values.numel() // (channels.numel() * rows))
            if cols % taps:
                taps = 1
    with torch.device("meta"):
        if taps > 1:
            return _weightless(nn.Conv1d(cols // taps, rows, taps, bias=False), (rows, cols // taps, taps))
        if in_dim == 0:
            module = Conv1D(cols, rows)
            del module.bias
            return _weightless(module, shape)
        return _weightless(nn.Linear(cols, rows, bias=False), shape)


def _skeleton(layers: dict[str, nn.Module]) -> nn.Module:
    """A model that has these layers under their names, and nothing else."""
    root = nn.Module()
    for name, layer in layers.items():
        *path, last = name.split(".")
        parent = root
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent._modules[part]
        if last in parent._modules or type(parent) is not nn.Module:
            raise ValueError(f"layer {name}: it lies inside another layer of the adapter; its file is damaged")
        parent.add_module(last, layer)
    return root


def _load(
    config: BaseSparseConfig, layers: dict[str, nn.Module], states: dict[str, dict[str, Tensor]], marker: str
) -> dict[str, TunerLayer]:
    own = {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None, "bias": "none"}
    beside = {"modules_to_save": None, "trainable_token_indices": None}
    config = replace(config, target_modules=set(layers), inference_mode=True, **own, **beside)
    model = _skeleton(layers)
    state_dict = {f"{layer}{marker}{part}": t for layer, found in states.items() for part, t in found.items()}
    entries = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type].file_sizes(state_dict)
    lacking = [layer for layer in layers if layer not in entries]
    if lacking:
        raise ValueError(f"layer {lacking[0]}: the adapter's file has no values for it; save or download it again")
    inject_adapter_in_model(config, model, state_dict=state_dict)
    result = set_peft_model_state_dict(model, dict(state_dict))
    if result.unexpected_keys:
        raise ValueError(f"{result.unexpected_keys[0]}: no tensor of a {type(config).__name__} adapter; it is damaged")
    return {layer.name: layer for layer in BaseSparseModel.sparse_layers(model)}


def entrywise(adapter: StoredAdapter) -> StoredAdapter:
    """An adapter of sparse deltas of whatever method as one of [`SparseConfig`][sparse_peft.SparseConfig].

    Raises:
        ValueError: its deltas are not sparse.
    """
    if type(adapter.config) is SparseConfig:
        return adapter
    if not adapter.is_sparse:
        raise ValueError(
            f"{adapter.folder}: the deltas of {type(adapter.config).__name__} are not sparse: they have low-rank "
            "factors"
        )
    states = {}
    for name, state in adapter.states.items():
        entries = state.as_sparse()
        support = Support(entries.support.shape, entries.support.indices, validate=False, name=name)
        states[name] = sparse_state(support, entries.values.float())
    return replace(adapter, config=sparse_config(adapter.config, states), states=states)


def sparse_state(support: Support, values: Tensor) -> SparseDelta:
    """A sparse delta with these values, outside of any model."""
    recipe = SupportRecipe("random", support.nnz, 0, support.name)
    state = SparseDelta(support.shape, support.nnz, support.name, recipe, support)
    state.values.data = values
    return state


def sparse_tensors(states: dict[str, SparseDelta]) -> dict[str, Tensor]:
    """Sparse deltas ``{layer: state}`` as a file of a [`SparseConfig`][sparse_peft.SparseConfig] adapter has them."""
    return named_tensors(
        SparseModel, {name: {"values": s.values.detach(), **s.file_tensors()} for name, s in states.items()}
    )


def sparse_config(like: Any, states: dict[str, SparseDelta]) -> SparseConfig:
    """The config of an adapter with these sparse deltas, for the base model of another adapter."""
    tensors = {name: {"values": state.values} for name, state in states.items()}
    bias = getattr(like, "bias", "none")
    config = SparseConfig(
        weight_shapes={name: list(state.shape) for name, state in states.items()},
        base_model_name_or_path=like.base_model_name_or_path,
        revision=like.revision,
        task_type=like.task_type,
        modules_to_save=like.modules_to_save,
        trainable_token_indices=getattr(like, "trainable_token_indices", None),
        bias="sparse_peft_delta_only" if bias.endswith("_only") else bias,
    )
    return combined_config(SparseModel, [config], tensors)
