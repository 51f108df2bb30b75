"""Exact conversion of sparse adapters to plain LoRA, which any PEFT loads without this package, and back.

A delta of ``k`` whole columns is ``D S``, with ``D`` the columns and ``S`` ``(k, in)`` the rows of the identity that
select them: LoRA of rank ``k`` whose ``A`` is ``S``. Rows likewise, with ``B`` the selection. What
holds for whole columns holds for any delta with few rows or columns that are not empty.
"""

from __future__ import annotations

import os
from collections import Counter

import torch
from peft import LoraConfig
from torch import Tensor, nn

from ..ops import ConvProduct, write_support_
from ..support import ChannelSupport, Support
from ..tuners.base_layer import SparseTunerLayer
from ..tuners.base_model import BaseSparseModel
from ..tuners.s2ft import S2FTConfig
from .files import PREFIX, config_of, read_adapter, tensors_of, write_adapter


def _lines(support: Support) -> tuple[int, Tensor]:
    """``(dim, lines)``: the rows (0) or columns (1) that hold entries, whichever are fewer."""
    if isinstance(support, ChannelSupport):
        return support.dim, support.lines
    rows, cols = support.rows.long().unique(), support.cols.long().unique()
    return (0, rows) if rows.numel() < cols.numel() else (1, cols)


def _selection(lines: Tensor, size: int) -> Tensor:
    """``(lines, size)``: those rows of the identity."""
    return torch.zeros(lines.numel(), size, device=lines.device).scatter_(1, lines[:, None], 1.0)


def lora_factors(layer: SparseTunerLayer, adapter_name: str) -> tuple[Tensor, Tensor]:
    """``A`` and ``B`` of one layer's delta, float32, of the shapes that PEFT's LoRA gives them; ``B A`` is the delta.

    Returns:
        ``(rank, in_features)`` and ``(out_features, rank)``; of a convolution with its kernel behind them.
    """
    support, values = layer.support(adapter_name), layer.deltas[adapter_name].values.detach()
    rows, cols = support.shape
    dense = torch.zeros(support.shape, device=values.device)
    write_support_(dense, support, values.float())
    dim, lines = _lines(support)
    if dim == 1:
        left, right = dense.index_select(1, lines), _selection(lines, cols)
    else:
        left, right = _selection(lines, rows).t(), dense.index_select(0, lines)
    if layer.product.in_dim == 0:
        left, right = right.t(), left.t()
    if isinstance(layer.product, ConvProduct):
        kernel = layer.product.kernel
        right = right.reshape(right.shape[0], -1, *kernel)
        left = left.reshape(*left.shape, *(1 for _ in kernel))
    return right.contiguous(), left.contiguous()


def to_lora(model: nn.Module, adapter_name: str = "default") -> tuple[LoraConfig, dict[str, Tensor]]:
    """An adapter as plain LoRA: its config, and its tensors under the names that they have in a file.

    Every layer has its own rank, in ``rank_pattern``; layers without trained entries are left out.

    Raises:
        ValueError: no such adapter, no entries at all, or a grouped convolution.
    """
    config, prefix = config_of(model, adapter_name), None
    tensors, ranks, transposed = {}, {}, False
    for layer in BaseSparseModel.sparse_layers(model):
        if adapter_name not in layer.deltas or layer.support(adapter_name).nnz == 0:
            continue
        if isinstance(layer.product, ConvProduct) and layer.product.groups > 1:
            raise ValueError(f"layer {layer.name}: a convolution of {layer.product.groups} groups has no LoRA form")
        prefix = f".{layer.delta_container}"
        down, up = lora_factors(layer, adapter_name)
        tensors[f"{PREFIX}{layer.name}.lora_A.weight"] = down
        tensors[f"{PREFIX}{layer.name}.lora_B.weight"] = up
        ranks[layer.name] = down.shape[0]
        transposed = transposed or layer.product.in_dim == 0
    if not ranks:
        raise ValueError(f"adapter {adapter_name!r} has no layer with trained entries")
    # what trains beside the layers: modules saved whole, biases
    rest = {name: tensor for name, tensor in tensors_of(model, adapter_name).items() if prefix not in name}
    (usual, _), *_ = Counter(ranks.values()).most_common(1)
    lora = LoraConfig(
        r=usual,
        lora_alpha=usual,
        rank_pattern={name: rank for name, rank in ranks.items() if rank != usual},
        alpha_pattern={name: rank for name, rank in ranks.items() if rank != usual},
        target_modules=sorted(ranks),
        fan_in_fan_out=transposed,
        bias="lora_only" if config.bias.endswith("_only") else config.bias,
        modules_to_save=config.modules_to_save,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
    )
    return lora, {**tensors, **rest}


def save_as_lora(model: nn.Module, folder: str | os.PathLike, adapter_name: str = "default") -> LoraConfig:
    """Save an adapter as plain LoRA that makes the same of every input, up to float rounding.

    The rank of a layer is its number of trained rows or columns: large, so this is for servers that know LoRA only.

    Args:
        model: the model that has the adapter.
        folder: made if need be.
        adapter_name: which.

    Returns:
        The LoRA's config.

    Raises:
        ValueError: see :func:`to_lora`.
    """
    config, tensors = to_lora(model, adapter_name)
    write_adapter(folder, config, tensors)
    return config


def _selected(factor: Tensor) -> Tensor | None:
    """``(rank,)`` which row of the identity each row of ``(rank, features)`` is; None if they are no such rows."""
    is_one = factor == 1
    if not (bool((factor[~is_one] == 0).all()) and bool((is_one.sum(1) == 1).all())):
        return None
    lines = is_one.float().argmax(1)
    return lines if lines.unique().numel() == lines.numel() else None


def save_lora_as_s2ft(lora_folder: str | os.PathLike, folder: str | os.PathLike) -> S2FTConfig:
    """Turn a LoRA adapter whose ``A`` or ``B`` selects channels, such as :func:`save_as_lora` wrote, into S2FT.

    Args:
        lora_folder: of the LoRA adapter.
        folder: where the S2FT adapter is written.

    Returns:
        The S2FT adapter's config.

    Raises:
        ValueError: no LoRA adapter, or a layer whose factors select no channels.
    """
    lora, tensors = read_adapter(lora_folder)
    if not isinstance(lora, LoraConfig):
        raise ValueError(f"{lora_folder}: a LoRA adapter is expected, this is {lora.peft_type}")
    names = [key[len(PREFIX) : -len(".lora_A.weight")] for key in tensors if key.endswith(".lora_A.weight")]
    counts, sides, shapes, converted = {}, {}, {}, {}
    for name in names:
        down, up = (tensors.pop(f"{PREFIX}{name}.lora_{part}.weight").float() for part in "AB")
        taps = down[0, 0].numel()
        down, up = down.flatten(1), up.flatten(1)
        lines, side = _selected(down), "in"
        if lines is None:
            lines, side = _selected(up.t()), "out"
        if lines is None:
            raise ValueError(
                f"layer {name}: neither lora_A nor lora_B selects channels, so this LoRA adapter is no S2FT adapter; "
                "only what save_as_lora made of one can be turned back"
            )
        order = lines.argsort()
        delta = up[:, order] if side == "in" else down[order]
        rank, alpha = lora.rank_pattern.get(name, lora.r), lora.alpha_pattern.get(name, lora.lora_alpha)
        delta = delta * (alpha / (rank**0.5 if lora.use_rslora else rank))
        dim, channels = (1 if side == "in" else 0), lines[order]
        if dim == 1 and taps > 1:
            channels = channels.view(-1, taps)[:, 0] // taps
        shape = [up.shape[0], down.shape[1]]
        if lora.fan_in_fan_out and taps == 1:
            shape, dim, delta = shape[::-1], 1 - dim, delta.t()
        key = f"{PREFIX}{name}.sparse_peft_s2ft_adapter."
        converted[f"{key}values"] = delta.reshape(-1)
        converted[f"{key}{('rows', 'columns')[dim]}"] = channels.to(torch.int32)
        counts[name], sides[name], shapes[name] = channels.numel(), side, shape
    config = S2FTConfig(
        target_modules=names,
        num_channels=counts,
        sides=sides,
        weight_shapes=shapes,
        bias="sparse_peft_s2ft_only" if lora.bias == "lora_only" else lora.bias,
        modules_to_save=lora.modules_to_save,
        task_type=lora.task_type,
        base_model_name_or_path=lora.base_model_name_or_path,
    )
    write_adapter(folder, config, {**converted, **tensors})
    return config
