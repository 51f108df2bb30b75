"""Sparse adapters of other programs: SHiRA's and Super-Tuning's, SpIEL's, LT-SFT's and SaRA's files.

Nothing is unpickled by Python's ``pickle``. SpIEL, LT-SFT and SaRA publish ``torch.save`` files. They are read by
``torch.load(weights_only=True)``, which builds tensors and plain containers and nothing else. LT-SFT's format also has
NumPy's integer scalars, which are allowed for it.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from torch import Tensor, nn

from ..support import Support
from ..tuners.files.checks import check_values
from ..tuners.targets import is_convolution, stored_shape
from .files import PREFIX, NoAdapterError, read_tensors
from .weight_reader import Weights, known_name

LT_SFT_NAME = "pytorch_diff.bin"
CONFIG_FIELDS = ("base_model_name_or_path", "revision", "task_type", "modules_to_save")


@dataclass(frozen=True)
class ForeignAdapter:
    """Another program's adapter, its positions sorted and in row-major order.

    Attributes:
        like: the fields of its config that a sparse adapter has as well.
        deltas: ``{layer: (support, float32 values)}``.
        rest: tensors that are stored beside, by names in a PEFT adapter's file.
        others: changes of tensors that are no target weights, ``{tensor: (flat positions, values)}``.
        whole: tensors that take the place of the base's.
    """

    like: SimpleNamespace
    deltas: dict[str, tuple[Support, Tensor]]
    rest: dict[str, Tensor] = field(default_factory=dict)
    others: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)


def source_format(source: str | os.PathLike) -> str:
    """``"lt_sft"``, ``"sara"`` for any other file, or the PEFT type in an adapter's config.

    Raises:
        ValueError: neither is there.
    """
    path = Path(source)
    is_adapter = (path / CONFIG_NAME).is_file()
    if path.name == LT_SFT_NAME or ((path / LT_SFT_NAME).is_file() and not is_adapter):
        return "lt_sft"
    if path.is_file():
        return "sara"
    return str(read_config(path).get("peft_type"))


def read_config(folder: Path) -> dict[str, Any]:
    """An adapter's config as it is written; its type need not be registered.

    Raises:
        NoAdapterError: there is none.
        ValueError: it is damaged.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise NoAdapterError(
            f"{folder}: neither {CONFIG_NAME} nor {LT_SFT_NAME} in it; an adapter's folder is expected"
        )
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: no valid JSON ({error}); copy or download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: an object is expected, this is {type(content).__name__}")
    return content


def _like(config: dict[str, Any]) -> SimpleNamespace:
    return SimpleNamespace(**{name: config.get(name) for name in CONFIG_FIELDS})


def _delta(layer: str, shapes: dict[str, tuple[int, int]], flat: Tensor, values: Tensor) -> tuple[Support, Tensor]:
    """Check one layer's entries against the base model, and sort them."""
    shape = shapes.get(layer)
    if shape is None:
        raise ValueError(f"layer {layer}: the base model has no linear layer of this name; it is for another model")
    if flat.shape != values.shape or flat.ndim != 1 or not values.is_floating_point():
        raise ValueError(
            f"layer {layer}: {tuple(values.shape)} values of {values.dtype} for {tuple(flat.shape)} positions; the "
            "file is damaged"
        )
    check_values(values, layer, "convert")
    Support.from_indices(shape, flat, name=layer)  # refuses positions out of range and repeated ones
    order = flat.argsort()
    support = Support(shape, flat[order], validate=False, name=layer)
    return support, values[order].float()


def _two_per_layer(
    tensors: dict[str, Tensor], first: str, second: str, source: str
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """``{layer: (its tensor first, its tensor second)}``, and the tensors of no layer."""
    layers: dict[str, dict[str, Tensor]] = {}
    rest = {}
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        if layer and part in (first, second):
            layers.setdefault(layer.removeprefix(PREFIX), {})[part] = tensor
        else:
            rest[name] = tensor
    for layer, found in layers.items():
        if len(found) < 2:
            (missing,) = {first, second} - set(found)
            raise ValueError(f"{source}: layer {layer} has no {missing}")
    if not layers:
        raise ValueError(f"{source}: no layer with {first} and {second} in it")
    return {layer: (found[first], found[second]) for layer, found in layers.items()}, rest


def read_shira(source: str | os.PathLike, shapes: dict[str, tuple[int, int]]) -> ForeignAdapter:
    """PEFT's SHiRA: values and ``(2, entries)`` rows and columns, for each layer."""
    folder = Path(source)
    layers, rest = _two_per_layer(
        read_tensors(folder / SAFETENSORS_WEIGHTS_NAME), "shira_weight", "shira_indices", str(folder)
    )
    deltas = {}
    for layer, (values, where) in layers.items():
        if where.ndim != 2 or where.shape[0] != 2:
            raise ValueError(f"layer {layer}: shira_indices of shape {tuple(where.shape)}; (2, entries) is expected")
        rows, cols = where.long()  # PEFT on Windows saves them as floats
        shape = shapes.get(layer, (0, 0))
        if layer in shapes and bool(((rows < 0) | (rows >= shape[0]) | (cols < 0) | (cols >= shape[1])).any()):
            raise ValueError(f"layer {layer}: shira_indices outside of its {shape[0]} x {shape[1]} weight")
        deltas[layer] = _delta(layer, shapes, rows * shape[1] + cols, values)
    return ForeignAdapter(_like(read_config(folder)), deltas, rest)


def read_supertuning(source: str | os.PathLike, shapes: dict[str, tuple[int, int]]) -> ForeignAdapter:
    """PEFT's Super-Tuning without low rank: values and flat positions, for each layer."""
    folder = Path(source)
    config = read_config(folder)
    if config.get("r") is not None:
        raise ValueError(
            f"{folder}: r={config['r']}: Super-Tuning with low rank (Supra) is no sparse delta; merge it into the "
            "base, or train SLTrainConfig, which has that form"
        )
    if config.get("save_precomputed_indices") is False:
        raise ValueError(
            f"{folder}: save_precomputed_indices=false: the file has no positions, which PEFT finds again from the "
            f"base model. Set it to true in {CONFIG_NAME}, load the adapter on its base model with "
            "PeftModel.from_pretrained, and save it again with save_pretrained"
        )
    names = "supertuning_values", "supertuning_indices"
    layers, rest = _two_per_layer(read_tensors(folder / SAFETENSORS_WEIGHTS_NAME), *names, str(folder))
    deltas = {layer: _delta(layer, shapes, flat, values) for layer, (values, flat) in layers.items()}
    return ForeignAdapter(_like(config), deltas, rest)


def read_spiel(source: str | os.PathLike, shapes: dict[str, tuple[int, int]]) -> ForeignAdapter:
    """SpIEL's: values and flat positions, in any order, for each layer."""
    folder = Path(source)
    if (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        tensors = read_tensors(folder / SAFETENSORS_WEIGHTS_NAME)
    else:
        tensors = load_pickled(folder / WEIGHTS_NAME)
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"{folder}: a state dict of tensors is expected in its file")
    layers, rest = _two_per_layer(tensors, "values", "indices", str(folder))
    deltas = {}
    for key, (values, flat) in layers.items():
        layer, found, _ = f"{key}.".partition(".sft_delta.")
        if not found:
            raise ValueError(f"{folder}: {key} is no layer of a SpIEL adapter, whose names end in '.sft_delta'")
        deltas[layer] = _delta(layer, shapes, flat, values)
    return ForeignAdapter(_like(read_config(folder)), deltas, rest)


def read_lt_sft(
    source: str | os.PathLike, shapes: dict[str, tuple[int, int]], known: dict[str, tuple[int, ...]], prefix: str
) -> ForeignAdapter:
    """LT-SFT's: gaps between column-major positions, for each tensor of the model, and whole tensors beside.

    Args:
        source: ``pytorch_diff.bin`` or its folder.
        shapes: of the linear layers' stored weights.
        known: ``{tensor: shape}`` of the whole model.
        prefix: see ``known_name``.
    """
    path = Path(source)
    path = path if path.name == LT_SFT_NAME else path / LT_SFT_NAME
    integers = (np.int64, np.int32, np.uint64, np.uint32)
    scalar: Any = np.int64(0).__reduce__()[0]  # the constructor of a pickled NumPy scalar
    allowed: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
        np.dtype,
        *(type(np.dtype(kind)) for kind in integers),
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
    ]
    content = load_pickled(path, allowed)
    if not isinstance(content, dict) or not isinstance(content.get("diffs"), dict):
        raise ValueError(f"{path}: no LT-SFT file; a dict with 'diffs' and 'abs' is expected")
    deltas, others, whole = {}, {}, {}
    for stored, entry in content["diffs"].items():
        name = known_name(str(stored), set(known), prefix)
        flat, values = _decode(name, entry, known)
        layer = name.removesuffix(".weight")
        if layer != name and layer in shapes:
            if flat.numel():
                deltas[layer] = _delta(layer, shapes, flat, values)
        elif flat.numel():
            check_values(values, name, "convert")
            others[name] = flat, values.float()
    for stored, tensor in (content.get("abs") or {}).items():
        name = known_name(str(stored), set(known), prefix)
        if not isinstance(tensor, Tensor) or name not in known or tuple(tensor.shape) != known[name]:
            shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{path}: abs: {name} is {shape}, and the base model has {known.get(name, 'none')}")
        whole[name] = tensor
    if not deltas:
        raise ValueError(f"{path}: no linear layer of the base model is changed; is it the model it was made for?")
    return ForeignAdapter(_like({}), deltas, {}, others, whole)


def _decode(name: str, entry: Any, known: dict[str, tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    """Row-major flat positions ``(entries,)`` int64 and values of one tensor of an LT-SFT file."""
    if not isinstance(entry, dict) or not {"size", "index_steps", "values"} <= set(entry):
        raise ValueError(f"{name}: no size, index_steps and values; the file is damaged")
    size, values = tuple(int(n) for n in entry["size"]), entry["values"]
    if known.get(name) != size:
        raise ValueError(f"{name}: made for a tensor of {size}, the base model has {known.get(name, 'none')}")
    steps = torch.as_tensor([int(step) for step in entry["index_steps"]], dtype=torch.int64)
    if not isinstance(values, Tensor) or values.ndim != 1 or values.numel() != steps.numel():
        raise ValueError(f"{name}: {steps.numel()} positions but a different number of values; the file is damaged")
    numel = torch.Size(size).numel()
    if steps.numel() and (bool((steps[1:] <= 0).any()) or int(steps[0]) < 0 or bool((steps >= numel).any())):
        raise ValueError(f"{name}: index_steps are no gaps between increasing positions; the file is damaged")
    columnwise = steps.cumsum(0)
    if columnwise.numel() and not 0 <= int(columnwise[-1]) < numel:
        raise ValueError(f"{name}: positions up to {int(columnwise[-1])} for a tensor of {numel} entries")
    flat, stride = torch.zeros_like(columnwise), numel
    for extent in size:  # the first dimension is the fastest in the file, the slowest in memory
        stride //= max(extent, 1)
        flat += columnwise % extent * stride
        columnwise = columnwise // extent
    return flat, values


def read_sara(
    source: str | os.PathLike, structure: nn.Module, weights: Weights, threshold: float | None
) -> ForeignAdapter:
    """SaRA's: of the parameter with each number, the trained weights of those whose size was below the threshold.

    The file has no positions: they follow from the base weights, which therefore must be those of the training.

    Args:
        source: the file.
        structure: the model whose ``parameters()`` were trained.
        weights: its weights.
        threshold: for files without one.
    """
    path = Path(source)
    content = load_pickled(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a dict of the parameters' trained weights is expected")
    content = dict(content)
    limit = content.pop("threshold", threshold)
    if not isinstance(limit, (int, float)):
        raise ValueError(f"{path}: threshold={limit!r}: it says which weights were trained; pass that of the training")
    names = [name for name, _ in structure.named_parameters()]
    if sorted(content, key=str) != sorted(range(len(names)), key=str):
        raise ValueError(
            f"{path}: {len(content)} parameters in the file and {len(names)} in the base model; pass the module whose "
            "parameters() were trained, such as a pipeline's unet"
        )
    deltas, others = {}, {}
    for number, name in enumerate(names):
        before, after = weights.read(name).float().reshape(-1), content[number]
        flat = (before.abs() < limit).nonzero().squeeze(1)
        if not isinstance(after, Tensor) or after.shape != flat.shape:
            count = tuple(after.shape) if isinstance(after, Tensor) else type(after).__name__
            raise ValueError(
                f"{name}: {count} in the file, and {flat.numel()} weights of the base model are below {limit}; it is "
                "for another base, or for the same one in another dtype"
            )
        change, layer = after.float() - before[flat], name.removesuffix(".weight")
        module = structure.get_submodule(layer) if layer != name else None
        if module is not None and flat.numel() and (isinstance(module, nn.Linear) or is_convolution(module)):
            deltas[layer] = _delta(layer, {layer: stored_shape(module)}, flat, change)
        elif bool(change.any()):
            check_values(change, name, "convert")
            others[name] = flat, change
    if not deltas:
        raise ValueError(f"{path}: no linear layer or convolution has weights below {limit}")
    return ForeignAdapter(_like({}), deltas, {}, others)


def load_pickled(path: Path, allowed: list | None = None) -> Any:
    """A ``torch.save`` file's tensors and plain containers; anything else in it is refused.

    Raises:
        ValueError: there is no such file, or it has something else in it.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with torch.serialization.safe_globals(allowed or []):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None)
    except Exception as error:  # torch's unpickler raises many kinds for damaged files
        raise ValueError(
            f"{path}: not read, since it has more in it than tensors and plain containers, or is damaged: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__} Files like that can run code. Load "
            "it with the program that wrote it, where you trust it, and save the adapter as safetensors"
        ) from error
