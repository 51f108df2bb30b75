"""Adapter files, checked before they are loaded."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...constraints import validated
from ...support import check_indices

DAMAGED = "the adapter is damaged: save, copy or download it again"
# Limits that no honest file comes near: safetensors' own, and a config with a number for each of 100,000 layers.
MOST_HEADER_BYTES = 100_000_000
MOST_CONFIG_BYTES = 2**25
# Of a folder's name, on common file systems.
MOST_NAME_BYTES = 255
BASE_ADAPTER = "__base__"  # PEFT's name for "no adapter" in a mixed batch
# Names that nn.ModuleDict and nn.ParameterDict, where PEFT keeps adapters, cannot have as keys.
RESERVED_NAMES = frozenset(dir(nn.ModuleDict())) | frozenset(dir(nn.ParameterDict()))
VALUE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_adapter_name(name: Any) -> None:
    """Refuse names that cannot be part of a parameter's name and the name of a folder.

    Raises:
        TypeError: no str.
        ValueError: empty, too long, with a dot, a separator of paths or a character that cannot be printed, or a name
            that means something else.
    """
    name = validated("adapter_name", name, str)
    if not name or not name.isprintable() or any(character in name for character in "./\\:"):
        raise ValueError(
            f"adapter_name={name!r}: a name is expected that can be a folder's and a module's, such as 'style_2': not "
            "empty, without dots, slashes, backslashes, colons and control characters"
        )
    if len(name.encode()) > MOST_NAME_BYTES:
        raise ValueError(
            f"adapter_name={name[:20]!r}...: {len(name.encode())} bytes, and a folder's name has at most "
            f"{MOST_NAME_BYTES}; choose a shorter one"
        )
    if name == BASE_ADAPTER:
        raise ValueError(f"adapter_name={name!r}: in mixed batches this means no adapter; choose another")
    if name in RESERVED_NAMES:
        raise ValueError(
            f"adapter_name={name!r}: torch's containers of adapters have an attribute of this name; choose another, "
            f"such as '{name}_1'"
        )


def read_config_file(path: str | os.PathLike) -> dict[str, Any]:
    """The JSON object in an ``adapter_config.json``.

    Raises:
        ValueError: the file is no JSON object, or larger than any adapter's config.
    """
    size = Path(path).stat().st_size
    if size > MOST_CONFIG_BYTES:
        raise ValueError(f"{path}: {size} bytes, where an adapter's config has at most {MOST_CONFIG_BYTES}; {DAMAGED}")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); {DAMAGED}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__} where an adapter's config is an object; {DAMAGED}")
    return content


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a file's header describes it.

    Attributes:
        shape: of the tensor.
        dtype: safetensors' name of it, such as ``"F32"``.
    """

    shape: tuple[int, ...]
    dtype: str


def shapes_in_file(directory: str | os.PathLike) -> dict[str, tuple[int, ...]]:
    """``{tensor name: shape}`` of the adapter's safetensors file in ``directory``; see ``tensors_in_file``."""
    return {name: tensor.shape for name, tensor in tensors_in_file(directory).items()}


def tensors_in_file(directory: str | os.PathLike) -> dict[str, StoredTensor]:
    """``{tensor name: shape and dtype}`` of the adapter's safetensors file in ``directory``, which must be complete.

    Nothing of it is loaded; memory is needed for the header alone. Empty without such a file.

    Raises:
        ValueError: the file is shorter than its header says, or has no valid header.
    """
    path = Path(directory, SAFETENSORS_WEIGHTS_NAME)
    if not path.is_file():
        return {}
    size, expected = path.stat().st_size, _size_by_header(path)
    if size != expected:
        raise ValueError(f"{path}: {size} bytes where its header announces {expected}; {DAMAGED}")
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
            return {name: StoredTensor(tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except SafetensorError as error:
        raise ValueError(f"{path}: no valid safetensors header ({error}); {DAMAGED}") from error


def _size_by_header(path: Path) -> int:
    """Bytes that a safetensors file has according to its header."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        if size < 8 or header_size > size - 8:
            raise ValueError(f"{path}: {size} bytes, too short for a safetensors header; {DAMAGED}")
        if header_size > MOST_HEADER_BYTES:
            raise ValueError(f"{path}: a header of {header_size} bytes, no valid safetensors header; {DAMAGED}")
        try:
            header = json.loads(file.read(header_size))
            ends = [t["data_offsets"][1] for k, t in header.items() if k != "__metadata__"]
            return 8 + header_size + max(ends, default=0)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}: no valid safetensors header ({error}); {DAMAGED}") from error


def check_dtype(tensor: Tensor, what: str, layer: str) -> None:
    """Refuse what is no float of 16 bits or more.

    Raises:
        ValueError: names the layer and the dtype.
    """
    if tensor.dtype not in VALUE_DTYPES:
        raise ValueError(
            f"layer {layer}: {what} of dtype {tensor.dtype} in the adapter file; floats of 16, 32 or 64 bits are "
            f"expected; {DAMAGED}"
        )


def check_values(values: Tensor, layer: str, action: str) -> None:
    """Refuse values that are not finite.

    Raises:
        ValueError: names the layer and how many values are NaN or infinite.
    """
    bad = int((~torch.isfinite(values)).sum()) if values.device.type != "meta" else 0
    if bad:
        raise ValueError(
            f"cannot {action} layer {layer}: {bad} of {values.numel()} values are NaN or infinite; "
            "the training diverged or the file is damaged: use an earlier checkpoint"
        )


def values_on_disk(values: Tensor, dtype: torch.dtype, layer: str) -> Tensor:
    """Values in the dtype that a file keeps them in.

    Raises:
        ValueError: values that are not finite, or too large for ``dtype``.
    """
    check_values(values, layer, "save")
    rounded = values.to(dtype)
    if rounded is not values and rounded.device.type != "meta" and int((~torch.isfinite(rounded)).sum()):
        raise ValueError(
            f"cannot save layer {layer}: its largest value, {float(values.abs().amax()):.6g}, exceeds the largest "
            f"number of save_dtype={str(dtype).removeprefix('torch.')!r}, {torch.finfo(dtype).max:.6g}; set "
            "save_dtype='float32' in the adapter's config"
        )
    return rounded


def check_loaded_entries(layer: str, values: Tensor, indices: Tensor, shape: tuple[int, int], expected: int) -> None:
    """Check one layer of an adapter file against the base layer it is to be loaded on.

    Args:
        layer: the layer's name.
        values: ``(entries,)`` floats of the file.
        indices: ``(entries,)`` flat positions of the file.
        shape: ``(rows, cols)`` of the base layer's stored weight.
        expected: number of entries of the adapter in the model.

    Raises:
        ValueError: another number of entries, values that are not finite, positions that are out of range, not
            sorted or repeated.
    """
    if values.shape != indices.shape or values.ndim != 1:
        raise ValueError(
            f"layer {layer}: {tuple(values.shape)} values for {tuple(indices.shape)} positions; "
            "the adapter file is damaged: save or download it again"
        )
    if values.numel() != expected:
        raise ValueError(
            f"layer {layer}: the adapter file has {values.numel()} entries where this model's adapter has {expected}; "
            "load it with the adapter_config.json it was saved with (PeftModel.from_pretrained), "
            "or into a model whose adapter has the same budget"
        )
    check_dtype(values, "values", layer)
    check_indices(indices, shape, layer)
    check_values(values, layer, "load")
