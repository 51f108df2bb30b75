"""Weights that are divided among processes when an adapter is made, and which of them can have one."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

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
    if isinstance(weight, Tensor):
        check_not_partitioned(name, weight, method)
    if isinstance(weight, DTensor):
        takes_parts = getattr(layer_cls, "adds_entries_only", False) and isinstance(base, nn.Linear)
        if takes_parts and TensorParallel.of(model, name, base) is not None:
            return
        raise NotImplementedError(f"Target module {name}: {_divided_by(base)}, and {method} needs it whole; {CURE}")


def check_not_partitioned(name: str, weight: Tensor, method: str) -> None:
    """Refuse a weight that DeepSpeed has partitioned.

    Raises:
        NotImplementedError: names the layer and the alternative.
    """
    if hasattr(weight, "ds_id"):
        raise NotImplementedError(
            f"Target module {name}: ZeRO stage 3 has partitioned its weight, and {method} needs it whole; use ZeRO "
            f"stage 1 or 2 with a static selection, FSDP2 or DDP"
        )


def check_mergeable(name: str, base: nn.Module) -> None:
    """Refuse to merge into a weight of which this process holds a part.

    Raises:
        NotImplementedError: names the wrapper, the layer and the alternative.
    """
    weight = getattr(base, "weight", None)
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
