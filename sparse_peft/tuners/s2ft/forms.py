"""Forms of S2FT: skeletons from a file's channels, and S2FT from LoRA that selects channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..combination import Tensors
from ..experts import is_named
from ..forms import LoraFactors, weightless_layer
from .config import S2FTConfig
from .delta import BUFFERS


def skeleton_of_channels(
    config: S2FTConfig, name: str, shape: tuple[int, int], tensors: Mapping[str, Tensor]
) -> nn.Module:
    """The weightless layer of a file's channels; see ``BaseSparseModel.skeleton_layer``.

    An input channel of a convolution is one column wide per tap of its kernel; the number of values shows the taps.
    """
    side = (config.sides or {}).get(name)
    if side is None:
        return weightless_layer(shape)
    if is_named(config.target_parameters, name):
        raise NotImplementedError(
            f"layer {name}: channels of fused experts are combined in a loaded model only; use add_weighted_adapter, "
            "or save_as_sparse before compose and soup"
        )
    rows, cols = shape
    dim = 0 if BUFFERS[0] in tensors else 1
    channels, values = tensors.get(BUFFERS[dim]), tensors.get("values")
    taps = 1
    if channels is not None and values is not None and channels.numel() and dim == 1:
        taps = max(1, values.numel() // (channels.numel() * rows))
    return weightless_layer(shape, dim if side == "in" else 1 - dim, taps if cols % taps == 0 else 1)


def channels_of_lora(factors: Mapping[str, LoraFactors], fan_in_fan_out: bool) -> tuple[dict[str, Any], Tensors]:
    """LoRA whose ``A`` or ``B`` selects channels, as S2FT; see ``BaseSparseModel.from_lora``."""
    fields: dict[str, Any] = {"scale": 1.0, "num_channels": {}, "sides": {}, "weight_shapes": {}}
    tensors: Tensors = {}
    for name, lora in factors.items():
        taps = lora.A[0, 0].numel()
        side, lines, delta = _selected_channels(name, lora)
        shape = [lora.B.shape[0], lora.A[0].numel()]
        dim, channels = (1 if side == "in" else 0), lines
        if dim == 1 and taps > 1:
            channels = channels.view(-1, taps)[:, 0] // taps
        if fan_in_fan_out and taps == 1:
            shape, dim, delta = shape[::-1], 1 - dim, delta.t()
        tensors[name] = {"values": delta.reshape(-1), BUFFERS[dim]: channels.to(torch.int32)}
        for field, value in (("num_channels", channels.numel()), ("sides", side), ("weight_shapes", shape)):
            fields[field][name] = value
    return fields, tensors


def _selected_channels(name: str, lora: LoraFactors) -> tuple[str, Tensor, Tensor]:
    """``(side, lines, delta)``: which inputs or outputs LoRA changes, ascending, and their delta as a matrix."""
    down, up = lora.A.float().flatten(1), lora.B.float().flatten(1)
    lines, side = _selection(down), "in"
    if lines is None:
        lines, side = _selection(up.t()), "out"
    if lines is None:
        raise ValueError(
            f"layer {name}: neither lora_A nor lora_B selects channels, so this LoRA adapter is no S2FT adapter; "
            "only what save_as_lora made of one can be turned back"
        )
    order = lines.argsort()
    return side, lines[order], (up[:, order] if side == "in" else down[order]) * lora.scale


def _selection(factor: Tensor) -> Tensor | None:
    """``(rank,)``: the rows of the identity that the rows of ``(rank, features)`` are; None if they are not."""
    is_one = factor == 1
    if not (bool((factor[~is_one] == 0).all()) and bool((is_one.sum(1) == 1).all())):
        return None
    lines = is_one.float().argmax(1)
    return lines if lines.unique().numel() == lines.numel() else None
