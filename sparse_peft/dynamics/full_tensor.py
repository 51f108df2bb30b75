"""Read and write tensors that FSDP2 or DeepSpeed divides among processes as if they were whole."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from ..calibrate.partitions import is_partitioned
from .zero import full_master, gathered_weight, write_master_


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor, detached; a divided one is gathered on every process.

    Of a parameter that ZeRO trains it is the float32 one.
    """
    master = full_master(tensor)
    if master is not None:
        return master
    if is_partitioned(tensor):
        return gathered_weight(tensor)
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def write_full_tensor_(tensor: Tensor, value: Tensor) -> None:
    """Write a tensor's content; of a divided one, each process writes its part.

    Args:
        tensor: the target, whole or divided.
        value: a whole tensor of the target's shape, the same on all processes.
    """
    if write_master_(tensor, value):
        return
    tensor = tensor.detach()
    value = value.to(tensor.dtype)
    if isinstance(tensor, DTensor):
        # every process has the value: nothing needs to be sent
        part = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
        tensor.to_local().copy_(part.to_local())
    else:
        tensor.copy_(value)
