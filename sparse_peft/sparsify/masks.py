"""The masks of a pruned model: with the model, in a file of one bit a weight, and the way back."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..calibrate.weights import base_of
from ..numerics.bits import count_bits, pack_bits, unpack_bits
from ..staging import staging_folder
from .replaced import replaced_layers

FORMAT = "sparse_peft_masks"
SUFFIX = ".mask"
MOST_LAYERS = 1_000_000  # and the longest side of a weight; no honest file comes near
MOST_SIDE = 2**31
DAMAGED = "the file is damaged or no file of masks: save or copy it again"
# The model's attribute that holds its masks. It is copied with the model and is no part of its state dict.
ATTRIBUTE = "_sparse_peft_masks"


@dataclass(frozen=True, eq=False)
class LayerMask:
    """Which weights of one layer stay, in one bit each.

    Attributes:
        bits: ``(rows, ceil(cols / 8))`` uint8 on the CPU, highest bit first; padding bits are 0.
        shape: ``(rows, cols)`` of the stored weight.
    """

    bits: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, mask: Tensor) -> LayerMask:
        """From ``(rows, cols)`` booleans in the layout of the stored weight."""
        return cls(pack_bits(mask).cpu(), (mask.shape[0], mask.shape[1]))

    def to_bool(self, device: torch.device | str = "cpu") -> Tensor:
        """``(rows, cols)`` bool: True where a weight stays."""
        return unpack_bits(self.bits.to(device), self.shape[1])

    @property
    def kept(self) -> int:
        """Number of weights that stay."""
        return count_bits(self.bits)

    @property
    def density(self) -> float:
        """Share of the weights that stay."""
        return self.kept / (self.shape[0] * self.shape[1])


@dataclass(frozen=True, eq=False)
class Removed:
    """What pruning took from a layer.

    Attributes:
        values: on the CPU, in the weight's dtype: of the masked weights, in row-major order, or the whole weight.
        whole: whether it is the whole weight, because weights that stay were changed too.
    """

    values: Tensor
    whole: bool


@dataclass(eq=False)
class Masks:
    """The masks of a pruned model.

    Attributes:
        layers: ``{layer name: mask}``.
        about: how they were made, in words: ``pattern``, ``score``, ...
        removed: ``{layer name: original values}`` if the model can be restored, otherwise empty. Not saved.

    Example:
        >>> import torch
        >>> from sparse_peft.sparsify import prune
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> masks = prune(model, "2:4")
        >>> masks.density, masks.layers["0"].to_bool().sum(1).tolist()
        (0.5, [4, 4, 4, 4])
    """

    layers: dict[str, LayerMask] = field(repr=False)
    about: dict[str, str] = field(default_factory=dict)
    removed: dict[str, Removed] = field(default_factory=dict, repr=False)

    @property
    def kept(self) -> int:
        """Number of weights that stay, over all layers."""
        return sum(mask.kept for mask in self.layers.values())

    @property
    def density(self) -> float:
        """Share of the layers' weights that stay."""
        return self.kept / sum(mask.shape[0] * mask.shape[1] for mask in self.layers.values())

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Set the masked weights of a model to zero, and record the masks with it.

        Args:
            model: with layers of the same names and shapes; without adapters.

        Raises:
            ValueError: a layer that the model does not have, or of another shape; nothing is changed then.
        """
        weights = self.weights_in(model)
        for name, weight in weights.items():
            weight.masked_fill_(~self.layers[name].to_bool(weight.device), 0)
        record(model, Masks(dict(self.layers), dict(self.about)))

    @torch.no_grad()
    def broken(self, model: nn.Module) -> dict[str, int]:
        """``{layer name: number of masked weights that are not zero}`` of a model; empty if all are."""
        found = {}
        for name, weight in self.weights_in(model).items():
            count = int(torch.count_nonzero(weight.masked_fill(self.layers[name].to_bool(weight.device), 0)))
            if count:
                found[name] = count
        return found

    def weights_in(self, model: nn.Module) -> dict[str, Tensor]:
        """``{layer name: weight}`` of a model, below any adapters.

        Raises:
            ValueError: a layer that the model does not have, or of another shape.
        """
        modules = dict(model.named_modules())
        weights: dict[str, Tensor] = {}
        for name, mask in self.layers.items():
            weight = getattr(base_of(modules[name]), "weight", None) if name in modules else None
            if not isinstance(weight, Tensor) or tuple(weight.shape) != mask.shape:
                has = "no such weight" if not isinstance(weight, Tensor) else f"one of {tuple(weight.shape)}"
                raise ValueError(
                    f"layer {name}: a mask for a weight of {mask.shape}, and {type(model).__name__} has {has}; use "
                    "the model that was pruned"
                )
            weights[name] = weight
        return weights

    def save(self, path: str | os.PathLike) -> None:
        """Write the masks as a safetensors file of one bit a weight; whole or not at all.

        Args:
            path: of the file, which is replaced; its folder is made if need be.
        """
        path = Path(path)
        content = {"format": 1, "about": self.about, "cols": {name: m.shape[1] for name, m in self.layers.items()}}
        tensors = {f"{name}{SUFFIX}": mask.bits for name, mask in self.layers.items()}
        with staging_folder(path.parent) as staging:
            save_file(tensors, staging / path.name, metadata={FORMAT: json.dumps(content)})

    @classmethod
    def load(cls, path: str | os.PathLike) -> Masks:
        """Read what [`save`][sparse_peft.sparsify.Masks.save] wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, or no file of masks.
        """
        text = os.fspath(path)
        with opened(path, "Masks.save") as file:
            content = description(text, file, FORMAT)
            cols, tensors = content.get("cols"), set(file.keys())
            if not isinstance(cols, dict) or not 0 < len(cols) <= MOST_LAYERS:
                raise ValueError(f"{text}: `cols` is not the columns of each layer; {DAMAGED}")
            if {f"{name}{SUFFIX}" for name in cols} != tensors:
                raise ValueError(f"{text}: other layers are described than it has masks of; {DAMAGED}")
            layers = {name: checked_mask(text, name, file.get_tensor(f"{name}{SUFFIX}"), cols[name]) for name in cols}
        return cls(layers, content["about"])


@contextmanager
def opened(path: str | os.PathLike, writer: str) -> Iterator[Any]:
    """A safetensors file, open for reading.

    Raises:
        FileNotFoundError: there is no such file; says which function writes one.
        ValueError: it is damaged.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{os.fspath(path)}: no such file; one that {writer} wrote is expected")
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{os.fspath(path)}: no valid safetensors file ({error}); {DAMAGED}") from error


def description(path: str, file: Any, key: str) -> dict[str, Any]:
    """What a file's metadata says about its content.

    Raises:
        ValueError: it says nothing under this key, or something of another form.
    """
    try:
        content = json.loads((file.metadata() or {}).get(key) or "null")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its description is no JSON ({error}); {DAMAGED}") from error
    if not isinstance(content, dict) or content.get("format") != 1:
        raise ValueError(f"{path}: its metadata has no {key} of format 1; {DAMAGED}")
    about = content.get("about")
    if not isinstance(about, dict) or not all(isinstance(value, str) for value in about.values()):
        raise ValueError(f"{path}: `about` is not a list of texts; {DAMAGED}")
    return content


def checked_mask(path: str, name: str, bits: Tensor, cols: Any) -> LayerMask:
    """A mask of which the bits come from a file.

    Raises:
        ValueError: bits of another type or shape, or behind the last column.
    """
    if isinstance(cols, bool) or not isinstance(cols, int) or not 0 < cols <= MOST_SIDE:
        raise ValueError(f"{path}: layer {name}: {cols!r} columns; {DAMAGED}")
    if bits.dtype != torch.uint8 or bits.ndim != 2 or bits.shape[0] < 1 or bits.shape[1] != -(-cols // 8):
        raise ValueError(
            f"{path}: layer {name}: bits of {bits.dtype} and shape {tuple(bits.shape)} for {cols} columns; "
            f"uint8 and (rows, {-(-cols // 8)}) are expected; {DAMAGED}"
        )
    if cols % 8 and bool((bits[:, -1] & (0xFF >> cols % 8)).any()):
        raise ValueError(f"{path}: layer {name}: bits behind column {cols}; {DAMAGED}")
    return LayerMask(bits, (bits.shape[0], cols))


# ------------------------------------------------------------------------------------------------------ with the model


def record(model: nn.Module, masks: Masks) -> None:
    """Keep masks with a model."""
    setattr(model, ATTRIBUTE, masks)


def masks_of(model: nn.Module) -> Masks | None:
    """The masks that a model, or the base model in it, was pruned with; None if it was not."""
    return next((found for module in model.modules() if (found := module.__dict__.get(ATTRIBUTE)) is not None), None)


@torch.no_grad()
def restore(model: nn.Module) -> None:
    """Give a pruned model its weights back, bit for bit, and forget its masks.

    Weights that stayed are not touched, unless pruning changed them (SparseGPT, ARMOR). Layers of
    [`r_sparse`][sparse_peft.sparsify.r_sparse] are given back first, and alone: call it again for a pruned model.

    Args:
        model: of ``r_sparse``, or pruned with ``restorable=True``.

    Raises:
        ValueError: the model was not pruned, or without ``restorable=True``.

    Example:
        >>> import torch
        >>> from sparse_peft.sparsify import prune, restore
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> before = model[0].weight.detach().clone()
        >>> _ = prune(model, 0.5, restorable=True)
        >>> restore(model)
        >>> torch.equal(model[0].weight, before)
        True
    """
    replaced, masks = replaced_layers(model), masks_of(model)
    unchanged = {name: layer for name, layer in replaced.items() if not layer.changes_weight}
    if unchanged:
        for name, layer in unchanged.items():
            model.set_submodule(name, layer.given_back())
        return
    if masks is None:
        raise ValueError(f"{type(model).__name__} has no masks; it was not pruned, or restored already")
    if not masks.removed:
        raise ValueError("the original weights were not kept; prune(..., restorable=True) keeps them, on the CPU")
    for name, layer in replaced.items():
        if name in masks.removed:
            model.set_submodule(name, layer.given_back())
    put_back(masks.weights_in(model), masks.layers, masks.removed)
    delattr(model, ATTRIBUTE)


def put_back(weights: Mapping[str, Tensor], layers: Mapping[str, LayerMask], removed: Mapping[str, Removed]) -> None:
    """Write original values into weights."""
    for name, original in removed.items():
        weight = weights[name]
        values = original.values.to(weight.device)
        if original.whole:
            weight.copy_(values)
        else:
            weight[~layers[name].to_bool(weight.device)] = values
