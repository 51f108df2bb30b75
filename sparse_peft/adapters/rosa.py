"""RoSA's masks and adapters (IST-DASLab/peft-rosa): positions for new adapters, and adapters as SLTrain's.

Nothing is unpickled by Python's ``pickle``; see ``sparse_peft.adapters.foreign``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from torch import Tensor, nn

from ..registry import method_named
from ..support import Support
from ..tuners.base_config import BaseSparseConfig
from ..tuners.files.checks import check_values
from ..tuners.targets import stored_shape
from .entry_format import named_tensors, sparse_state
from .files import PREFIX, read_tensors, write_adapter
from .foreign import load_pickled, read_config
from .weight_reader import name_of, structure_of

PARTS = ("rosa_A.weight", "rosa_B.weight", "rosa_spa.values", "rosa_spa.row_offs", "rosa_spa.col_idx")
OTHER_SCALES = ("use_rslora", "rank_pattern", "alpha_pattern", "density_pattern")


def rosa_masks(path: str | os.PathLike) -> dict[str, Support]:
    """The masks of a RoSA run (``mask_save_path``), for [`select_support`][sparse_peft.select_support].

    With ``selection="given"`` a [`SLTrainConfig`][sparse_peft.SLTrainConfig] trains low rank and these entries: RoSA's
    second run (section 4, https://arxiv.org/abs/2401.04679).

    Args:
        path: a ``torch.save`` file with a dense matrix for each layer, non-zero at the trained entries.

    Returns:
        ``{layer name: positions}``.

    Raises:
        ValueError: no such file, one with other things than matrices in it, or a layer without an entry.

    Example:
        >>> import tempfile, torch
        >>> from sparse_peft.adapters import rosa_masks
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"base_model.model.0": torch.eye(3, dtype=torch.bool)}, f"{folder}/masks")
        ...     masks = rosa_masks(f"{folder}/masks")
        >>> masks["0"].indices.tolist()
        [0, 4, 8]
    """
    content = load_pickled(Path(path))
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path}: a dict of the layers' masks is expected")
    supports = {}
    for stored, mask in content.items():
        name = str(stored).removeprefix(PREFIX)
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            kind = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"{path}: layer {name}: a matrix is expected, this is {kind}")
        supports[name] = Support.from_mask(mask != 0, name)
        if not supports[name].nnz:
            raise ValueError(f"{path}: layer {name}: its mask has no entry; the run ended before masks were made")
    return supports


def convert_rosa(
    source: str | os.PathLike, output: str | os.PathLike, *, base: nn.Module | str | os.PathLike
) -> BaseSparseConfig:
    """Write a RoSA adapter as an [`SLTrainConfig`][sparse_peft.SLTrainConfig] adapter with the same outputs.

    Args:
        source: folder of the RoSA adapter.
        output: folder; made if need be.
        base: the base model, loaded or its folder, for the layers' shapes.

    Returns:
        The new adapter's config.

    Raises:
        ValueError: no RoSA adapter, one with scales of single layers, for another base, or damaged; nothing is written
            then.
    """
    folder, structure = Path(source), structure_of(base)
    config = read_config(folder)
    if config.get("peft_type") != "ROSA":
        raise ValueError(
            f"{folder}: peft_type={config.get('peft_type')!r}: an adapter of peft_type 'ROSA' is expected"
        )
    for field in OTHER_SCALES:
        if config.get(field):
            raise ValueError(
                f"{folder}: {field}={config[field]!r}: SLTrainConfig has one rank and one scale for all layers; merge "
                "the adapter into the base with its own package"
            )
    safe = folder / SAFETENSORS_WEIGHTS_NAME
    tensors = read_tensors(safe) if safe.is_file() else load_pickled(folder / WEIGHTS_NAME)
    layers, rest = _by_layer(tensors, str(folder))
    modules = dict(structure.named_modules())
    made = {name: _layer(name, found, modules.get(name)) for name, found in layers.items()}
    method, rank = method_named("sltrain"), int(config["r"])
    make_config: Any = method.config_class
    supports = {name: support for name, (support, _) in made.items()}
    new = make_config(
        r=rank,
        alpha=config["lora_alpha"],
        scale=1.0,
        num_params=sum(support.nnz for support in supports.values()),
        num_entries={name: support.nnz for name, support in supports.items()},
        weight_shapes={name: list(support.shape) for name, support in supports.items()},
        target_modules=sorted(supports),
        modules_to_save=config.get("modules_to_save"),
        task_type=config.get("task_type"),
        base_model_name_or_path=config.get("base_model_name_or_path") or name_of(base),
    )
    if any(found["A"].shape[0] != rank for _, found in made.values()):
        raise ValueError(f"{folder}: r={rank} in the config, and factors of another rank; the file is damaged")
    found = named_tensors(method.model_class, {name: found for name, (_, found) in made.items()})
    write_adapter(output, new, {**found, **rest}, "Converted with `sparse_peft.adapters.convert_rosa`.")
    return new


def _by_layer(tensors: Any, source: str) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """``{layer: {part: tensor}}``, and the tensors of no layer."""
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"{source}: a state dict of tensors is expected in its file")
    layers: dict[str, dict[str, Tensor]] = {}
    rest = {}
    for name, tensor in tensors.items():
        layer, found, part = str(name).removeprefix(PREFIX).partition(".rosa_")
        if found:
            layers.setdefault(layer, {})[f"rosa_{part}"] = tensor
        else:
            rest[name] = tensor
    if not layers:
        raise ValueError(f"{source}: no layer with RoSA's tensors in it")
    for layer, parts in layers.items():
        missing = [part for part in PARTS if part not in parts]
        if missing:
            raise ValueError(f"{source}: layer {layer} has no {missing[0]}; RoSA without low rank, or without a mask")
    return layers, rest


def _layer(name: str, found: dict[str, Tensor], module: nn.Module | None) -> tuple[Support, dict[str, Tensor]]:
    """One layer's support, and what its SLTrain adapter has in a file."""
    if type(module) is not nn.Linear:
        raise ValueError(f"layer {name}: the base model has no linear layer of this name; it is for another model")
    down, up, values, offsets, columns = (found[part] for part in PARTS)
    rows, cols = stored_shape(module)
    if down.ndim != 2 or down.shape[1] != cols or tuple(up.shape) != (rows, down.shape[0]):
        raise ValueError(f"layer {name}: factors of {tuple(up.shape)} and {tuple(down.shape)} for {rows} x {cols}")
    offsets, columns = offsets.long(), columns.long() & 0xFFFF if columns.dtype == torch.int16 else columns.long()
    counts = offsets.diff()
    if offsets.numel() != rows + 1 or int(offsets[0]) != 0 or bool((counts < 0).any()):
        raise ValueError(f"layer {name}: row_offs are no row pointers of {rows} rows; the file is damaged")
    if not values.shape == columns.shape == (int(offsets[-1]),) or bool((columns >= cols).any() | (columns < 0).any()):
        raise ValueError(f"layer {name}: {values.numel()} values do not fit its positions; the file is damaged")
    for what, tensor in (("A", down), ("B", up), ("values", values)):
        check_values(tensor, f"{name} ({what})", "convert")
    flat = torch.arange(rows).repeat_interleave(counts) * cols + columns
    support, order = Support.from_indices((rows, cols), flat, name=name), flat.argsort()
    state = sparse_state(support, values[order].float())
    return support, {"A": down.float(), "B": up.float(), "values": state.values.data, **state.file_tensors()}
