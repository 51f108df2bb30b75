"""Files of pruned models that store their zeros as positions: one bit a weight, or compressed rows."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..calibrate.weights import Memory
from ..constraints import OneOf, Share, validated
from ..staging import staging_folder
from .armor import ArmorLinear
from .layers import check_without_adapters, layers_to_prune
from .masks import DAMAGED, LayerMask, Masks, checked_mask, description, masks_of, opened, record
from .replaced import replaced_layers, weight_name_of

LAYOUTS = ("bitmask", "csr")
"""How positions are stored; see [`save_sparse`][sparse_peft.sparsify.save_sparse]."""
FORMAT = "sparse_peft_weights"
_MOST_UINT16 = 2**16
_MOST_INT32 = 2**31 - 1


def zeros_of(model: nn.Module, least: Share = 0.05) -> Masks:
    """Masks of the zeros that the linear layers of a model have, such as one that was pruned elsewhere.

    Args:
        model: without adapters.
        least: share of zeros that a layer has at least; others have no mask.

    Raises:
        ValueError: no linear layer has as many.

    Example:
        >>> import torch
        >>> from sparse_peft.sparsify import zeros_of
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 4))
        >>> _ = model[1].weight.data[:, 2:].zero_()
        >>> zeros_of(model).layers["1"].kept
        8
    """
    found = {name: LayerMask.of(layer.weight() != 0) for name, layer in layers_to_prune(model).items()}
    least = validated("least", least, Share)
    found = {name: mask for name, mask in found.items() if mask.density <= 1 - least}
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no linear layer with {least:.0%} of zeros; prune(model, ...) it first"
        )
    return Masks(found, {"score": "the model's own zeros"})


def sparse_sizes(model: nn.Module) -> dict[str, int]:
    """``{layout: bytes}`` of all tensors of a pruned model, ``"dense"`` for the tensors as they are.

    A file also has a header of some 100 bytes for each tensor. For ``rows x cols`` weights of which ``n`` stay, values
    take ``n`` times their size; a bitmask takes ``rows * ceil(cols / 8)`` bytes more, and compressed rows
    ``4 * (rows + 1) + 2 * n``. The bitmask is smaller above a density of 1/16.

    Args:
        model: see [`save_sparse`][sparse_peft.sparsify.save_sparse].

    Example:
        >>> import torch
        >>> from sparse_peft.sparsify import prune, sparse_sizes
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False)).to(torch.bfloat16)
        >>> _ = prune(model, 0.5, progress=False)
        >>> sparse_sizes(model)
        {'dense': 8192, 'bitmask': 4608, 'csr': 8452}
    """
    tensors, masks = _tensors_of(model), _masks_by_tensor(model)
    rest = sum(tensor.nbytes for name, tensor in tensors.items() if name not in masks)
    sizes = {"dense": rest + sum(tensors[name].nbytes for name in masks)}
    values = sum(mask.kept * tensors[name].element_size() for name, mask in masks.items())
    sizes["bitmask"] = rest + values + sum(mask.bits.nbytes for mask in masks.values())
    sizes["csr"] = rest + values + sum(_csr_bytes(mask) for mask in masks.values())
    return sizes


def _csr_bytes(mask: LayerMask) -> int:
    rows, cols = mask.shape
    return (rows + 1) * (4 if mask.kept <= _MOST_INT32 else 8) + mask.kept * (2 if cols <= _MOST_UINT16 else 4)


@torch.no_grad()
def save_sparse(model: nn.Module, path: str | os.PathLike, layout: str = "bitmask") -> None:
    """Write a pruned model's tensors as one safetensors file without its zeros; whole or not at all.

    The masks are those recorded with the model, otherwise its zeros. A masked weight that is not zero is stored
    with the others, so that the file always has the model's numbers; zeros come back without a sign. Values are copied
    while they are written; the model itself is not.

    Args:
        model: without adapters.
        path: of the file, which is replaced; its folder is made if need be.
        layout: ``"bitmask"``: one bit for each weight; ``"csr"``: rows' ends and columns of the weights that stay,
            smaller below a density of 1/16. See [`sparse_sizes`][sparse_peft.sparsify.sparse_sizes].

    Raises:
        ValueError: a model with adapters, or without zeros.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from sparse_peft.sparsify import load_sparse, prune, save_sparse
        >>> model, other = (torch.nn.Sequential(torch.nn.Linear(8, 4)) for _ in range(2))
        >>> _ = prune(model, 0.5, progress=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_sparse(model, f"{folder}/sparse.safetensors")
        ...     masks = load_sparse(other, f"{folder}/sparse.safetensors")
        >>> torch.equal(other[0].weight, model[0].weight), masks.density
        (True, 0.5)
    """
    layout = validated("layout", layout, Annotated[str, OneOf(LAYOUTS)])
    tensors, masks, path = _tensors_of(model), _masks_by_tensor(model), Path(path)
    replaced = {name: layer.block for name, layer in _armor_layers(model).items()}
    content: dict[str, Any] = {"format": 1, "layout": layout, "shapes": {}, "replaced": replaced, "about": {}}
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name not in masks:
            stored[name] = tensor.contiguous()
            continue
        kept = masks[name].to_bool(tensor.device).logical_or_(tensor != 0)
        content["shapes"][name] = list(tensor.shape)
        positions = _bitmask(kept) if layout == "bitmask" else _csr(kept)
        stored |= {f"{name}.{part}": found.cpu() for part, found in positions.items()}
        stored[f"{name}.values"] = tensor[kept]
    if (recorded := masks_of(model)) is not None:
        content["about"] = recorded.about
    with staging_folder(path.parent) as staging:
        save_file(stored, staging / path.name, metadata={"format": "pt", FORMAT: json.dumps(content)})


@torch.no_grad()
def load_sparse(model: nn.Module, path: str | os.PathLike) -> Masks:
    """Read what [`save_sparse`][sparse_peft.sparsify.save_sparse] wrote into a model, bit for bit.

    Args:
        model: with the same tensors, such as ``AutoModelForCausalLM.from_config(config, dtype=...)``. Layers that
            ARMOR replaced are linear ones in it, and are replaced.
        path: of the file.

    Returns:
        The masks, also recorded with the model.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, of another kind, or of another model; the model is unchanged then.
    """
    where = os.fspath(path)
    with opened(path, "save_sparse") as file:
        content = description(where, file, FORMAT)
        replaced = _checked_replaced(where, content.get("replaced"), model)
        tensors = _tensors_of(model, replaced)
        _check_names(where, content, set(file.keys()), tensors)
        masks = {name: _checked_positions(where, file, name, content) for name in content["shapes"]}
        for name, tensor in tensors.items():
            _check_values(where, file, name, tensor, masks.get(name))
        for name, tensor in tensors.items():
            _read(file, name, tensor, masks.get(name))
        for layer, module in replaced.items():
            sides = (file.get_tensor(f"{layer}.{side}").to(module.weight.device) for side in ("left", "right"))
            model.set_submodule(layer, ArmorLinear(module.original, *sides))
    made = Masks({name.rpartition(".")[0]: mask for name, mask in masks.items()}, content["about"])
    record(model, made)
    return made


def _read(file: Any, name: str, tensor: Tensor, mask: LayerMask | None) -> None:
    """Overwrite a tensor, unless it is one of a layer that is made anew."""
    if mask is not None:
        values = file.get_tensor(f"{name}.values").to(tensor.device)
        tensor.zero_()[mask.to_bool(tensor.device)] = values
    elif not tensor.is_meta:
        tensor.copy_(file.get_tensor(name))


def _armor_layers(model: nn.Module) -> dict[str, ArmorLinear]:
    return {name: layer for name, layer in replaced_layers(model).items() if isinstance(layer, ArmorLinear)}


def _tensors_of(model: nn.Module, replaced: Mapping[str, ArmorLinear] | None = None) -> dict[str, Tensor]:
    """A model's state, each tensor once: of tied ones the first.

    Args:
        model: without adapters.
        replaced: layers that take the places of others, with factors on the meta device.

    Raises:
        ValueError: a model with adapters, or on the meta device.
    """
    check_without_adapters(model)
    found: dict[Any, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device and has no values; use model.to_empty(device='cpu') first")
        key = (Memory.of(tensor), tensor.shape, tensor.stride()) if tensor.numel() else name
        found.setdefault(key, (name, tensor))
    tensors = dict(found.values())
    for layer, module in (replaced or {}).items():
        tensors[f"{layer}.{module.weight_name}"] = tensors.pop(f"{layer}.weight")
        tensors |= {f"{layer}.left": module.left, f"{layer}.right": module.right}
    return tensors


def masks_for(model: nn.Module) -> Masks:
    """The masks recorded with a model, or those of its zeros."""
    return masks_of(model) or zeros_of(model)


def _masks_by_tensor(model: nn.Module) -> dict[str, LayerMask]:
    masks = masks_for(model)
    masks.weights_in(model)  # checked
    return {f"{name}.{weight_name_of(model.get_submodule(name))}": mask for name, mask in masks.layers.items()}


def _bitmask(kept: Tensor) -> dict[str, Tensor]:
    return {"bits": LayerMask.of(kept).bits}


def _csr(kept: Tensor) -> dict[str, Tensor]:
    ends = kept.sum(1).cumsum(0)
    offsets = torch.cat((ends.new_zeros(1), ends))
    columns = kept.nonzero()[:, 1]
    return {
        "offsets": offsets.to(torch.int32 if int(ends[-1]) <= _MOST_INT32 else torch.int64),
        "columns": columns.to(torch.uint16 if kept.shape[1] <= _MOST_UINT16 else torch.int32),
    }


_PARTS: Mapping[str, tuple[str, ...]] = {"bitmask": ("bits", "values"), "csr": ("offsets", "columns", "values")}


def _checked_replaced(path: str, blocks: Any, model: nn.Module) -> dict[str, ArmorLinear]:
    """The layers that take the places of linear ones, with factors on the meta device."""
    if not isinstance(blocks, dict):
        raise ValueError(f"{path}: `replaced` is not the block of each layer; {DAMAGED}")
    modules, there = dict(model.named_modules()), _armor_layers(model)
    found: dict[str, ArmorLinear] = {}
    for name, block in blocks.items():
        if name in there:
            continue
        module = modules.get(name)
        sizes = tuple(module.weight.shape) if isinstance(module, (nn.Linear, Conv1D)) else ()
        if module is None or not sizes or type(block) is not int or block < 1 or any(size % block for size in sizes):
            raise ValueError(
                f"{path}: layer {name} is in blocks of {block!r}, and the model's of {list(sizes)}; give the same "
                "model"
            )
        rows, cols = sizes[::-1] if isinstance(module, Conv1D) else sizes
        sides = (torch.empty(n // block, block, block, dtype=module.weight.dtype, device="meta") for n in (rows, cols))
        found[name] = ArmorLinear(module, *sides)
    return found


def _check_names(path: str, content: Mapping[str, Any], names: set[str], tensors: Mapping[str, Tensor]) -> None:
    """Refuse a file of a model with other tensors."""
    shapes, layout = content.get("shapes"), content.get("layout")
    if layout not in LAYOUTS or not isinstance(shapes, dict):
        raise ValueError(f"{path}: layout {layout!r}, and {', '.join(LAYOUTS)} are known; {DAMAGED}")
    for name, shape in shapes.items():
        if name not in tensors or shape != list(tensors[name].shape) or len(shape) != 2:
            has = f"of {list(tensors[name].shape)}" if name in tensors else "not there"
            raise ValueError(f"{path}: {name} is {shape!r} in the file and {has} in the model; give the same model")
    expected = set(tensors) - set(shapes) | {f"{name}.{part}" for name in shapes for part in _PARTS[layout]}
    if expected != names:
        raise ValueError(
            f"{path}: no {', '.join(sorted(expected - names)[:2]) or '-'} in the file, and no "
            f"{', '.join(sorted(names - expected)[:2]) or '-'} in the model; give a model of the same architecture"
        )


def _checked_positions(path: str, file: Any, name: str, content: Mapping[str, Any]) -> LayerMask:
    rows, cols = content["shapes"][name]
    if content["layout"] == "bitmask":
        mask = checked_mask(path, name, file.get_tensor(f"{name}.bits"), cols)
        if mask.shape[0] != rows:
            raise ValueError(f"{path}: {name}: bits of {mask.shape[0]} rows for {rows}; {DAMAGED}")
        return mask
    offsets, columns = file.get_tensor(f"{name}.offsets"), file.get_tensor(f"{name}.columns")
    fault = _csr_fault(offsets, columns, rows, cols)
    if fault is not None:
        raise ValueError(f"{path}: {name}: {fault}; {DAMAGED}")
    kept = torch.zeros(rows, cols, dtype=torch.bool)
    kept[_rows_of(offsets), columns.long()] = True
    return LayerMask.of(kept)


def _rows_of(offsets: Tensor) -> Tensor:
    return torch.arange(len(offsets) - 1).repeat_interleave(offsets.long().diff())


def _csr_fault(offsets: Tensor, columns: Tensor, rows: int, cols: int) -> str | None:
    """The reason why these are no compressed rows, or None."""
    if offsets.dtype not in (torch.int32, torch.int64) or tuple(offsets.shape) != (rows + 1,):
        return f"offsets of {offsets.dtype} and shape {tuple(offsets.shape)} for {rows} rows"
    if columns.dtype not in (torch.uint16, torch.int32) or columns.ndim != 1:
        return f"columns of {columns.dtype} and shape {tuple(columns.shape)}"
    if int(offsets[0]) != 0 or int(offsets[-1]) != len(columns) or bool((offsets.long().diff() < 0).any()):
        return f"offsets that do not rise from 0 to {len(columns)}"
    places = columns.long()
    if len(places) and not 0 <= int(places.min()) <= int(places.max()) < cols:
        return f"a column outside of {cols}"
    if bool((places.add_(_rows_of(offsets) * cols).diff() <= 0).any()):
        return "columns that do not rise within a row"
    return None


def _check_values(path: str, file: Any, name: str, tensor: Tensor, mask: LayerMask | None) -> None:
    found = file.get_tensor(name if mask is None else f"{name}.values")
    shape = tuple(tensor.shape) if mask is None else (mask.kept,)
    if found.dtype != tensor.dtype:
        raise ValueError(f"{path}: {name} is {found.dtype} in the file and {tensor.dtype} in the model; model.to() it")
    if tuple(found.shape) != shape:
        raise ValueError(f"{path}: {name}: numbers of shape {tuple(found.shape)}, and {shape} is expected; {DAMAGED}")
