"""Weights that are divided among processes when an adapter is made, and which of them can have one."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from ..calibrate.partitions import is_partitioned
from .tensor_parallel import TensorParallel

CURE = "use DDP, or wrap the model in FSDP2 (fully_shard) after the adapter is made"


def check_undivided(name: str, base: nn.Module, model: nn.Module, layer_cls: type[Any], method: str) -> None:
    """Refuse a target whose weight, or a part of it, lies in other processes.

    Tensor parallelism is for methods that train entries of linear layers.

    Args:
        name: of the layer.
        base: it, without adapters.
        model: that has it.
        layer_cls: the method's layers.
        method: for messages.

    Raises:
        NotImplementedError: names the wrapper, the layer and the alternative.
    """
    weight = getattr(base, "weight", None)
    check_not_partitioned(name, base, layer_cls, method)
    if isinstance(weight, DTensor):
        takes_parts = getattr(layer_cls, "adds_entries_only", False) and isinstance(base, nn.Linear)
        if takes_parts and TensorParallel.of(model, name, base) is not None:
            return
        raise NotImplementedError(f"Target module {name}: {_divided_by(base)}, and {method} needs it whole; {CURE}")


def check_not_partitioned(name: str, base: nn.Module, layer_cls: type[Any], method: str) -> None:
    """Refuse a weight that DeepSpeed has partitioned, but for linear layers of methods that can do with that.

    Raises:
        NotImplementedError: names the layer and the alternative.
    """
    weight = getattr(base, "weight", None)
    if not isinstance(weight, Tensor) or not is_partitioned(weight):
        return
    if getattr(layer_cls, "takes_partitions", False) and isinstance(base, (nn.Linear, Conv1D)):
        return
    raise NotImplementedError(
        f"Target module {name}: ZeRO stage 3 has partitioned its weight ({type(base).__name__}), and {method} needs "
        "it whole; use ZeRO stage 1 or 2, FSDP2 or DDP, or leave the layer out with exclude_modules"
    )


def check_made_before_sharding(name: str, layer: Any, adapter: str) -> None:
    """Refuse to train a new adapter in a layer that FSDP has wrapped already: nothing would average its gradients.

    Args:
        name: of the layer.
        layer: it, with adapters.
        adapter: the new one.

    Raises:
        NotImplementedError: names the adapter, the layer and the alternative.
    """
    if layer._is_sharded():
        raise NotImplementedError(
            f"adapter {adapter!r} in layer {name}: FSDP has wrapped the model, and would not average the gradients of "
            "an adapter that is added now; add all adapters before fully_shard, or load this one with "
            "is_trainable=False"
        )


def check_mergeable(name: str, base: nn.Module) -> None:
    """Refuse to merge into a weight of which this process holds a part.

    Raises:
        NotImplementedError: names the wrapper, the layer and the alternative.
    """
    weight = getattr(base, "weight", None)
    if isinstance(weight, Tensor) and is_partitioned(weight):
        raise NotImplementedError(
            f"layer {name}: ZeRO stage 3 divides its weight among processes, and merging needs it whole; save the "
            "adapter, and merge it in one process (PeftModel.from_pretrained(base, folder).merge_and_unload())"
        )
    if isinstance(weight, Tensor) and (isinstance(weight, DTensor) or weight.ndim < 2):
        by = _divided_by(base) if isinstance(weight, DTensor) else "FSDP1 divides its weight among processes"
        raise NotImplementedError(
            f"layer {name}: {by}, and merging needs it whole; save the adapter, and merge it in one process "
            "(PeftModel.from_pretrained(base, folder).merge_and_unload())"
        )


def _divided_by(base: Any) -> str:
    """The wrapper in words."""
    if base.__dict__.get("_is_fsdp_managed_module", False):
        return "FSDP2 (fully_shard) divides its weight among processes"
    if "forward" in base.__dict__:
        return "tensor parallelism (tp_plan) divides its weight among processes"
    return "its weight is a DTensor, divided among processes (torch's parallelize_module or distribute_tensor)"
