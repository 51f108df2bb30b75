"""Adapter files: written whole or not at all, and checked before they are loaded."""

from __future__ import annotations

import json
import os
import tempfile

import peft.peft_model
import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from ..support import check_indices


def check_adapter_file(directory: str) -> None:
    """Check that the adapter's safetensors file in ``directory``, if there is one, is complete.

    Raises:
        ValueError: the file is shorter than its header says, or has no valid header.
    """
    path = os.path.join(directory, SAFETENSORS_WEIGHTS_NAME)
    if not os.path.isfile(path):
        return
    cure = "the adapter is damaged: save, copy or download it again"
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        if size < 8 or header_size > size - 8:
            raise ValueError(f"{path}: {size} bytes, too short for a safetensors header; {cure}")
        try:
            header = json.loads(file.read(header_size))
            data_size = max((t["data_offsets"][1] for k, t in header.items() if k != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: no valid safetensors header ({error}); {cure}") from error
    expected = 8 + header_size + data_size
    if size != expected:
        raise ValueError(f"{path}: {size} bytes where its header announces {expected}; {cure}")


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
    if not values.is_floating_point():
        raise ValueError(f"layer {layer}: values of dtype {values.dtype} in the adapter file; floats are expected")
    check_indices(indices, shape, layer)
    check_values(values, layer, "load")


def guard_adapter_writes() -> None:
    """Make ``PeftModel.save_pretrained`` replace an adapter's weight file only once the new one is complete.

    PEFT writes the file in place, so a full disk leaves neither the old adapter nor the new one, and it offers no hook
    around the write. Its writer is therefore replaced, for every adapter of the process: same bytes, other moment.
    """
    write = peft.peft_model.safe_save_file
    if getattr(write, "replaces_whole_files", False):
        return

    def write_then_replace(tensors, filename, metadata=None):
        folder, name = os.path.split(os.fspath(filename))
        with tempfile.TemporaryDirectory(dir=folder or ".", prefix=".saving-") as staging:
            staged = os.path.join(staging, name)
            write(tensors, staged, metadata=metadata)
            os.replace(staged, filename)

    write_then_replace.replaces_whole_files = True
    peft.peft_model.safe_save_file = write_then_replace
