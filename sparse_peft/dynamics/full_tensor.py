"""Tensors that FSDP2 spreads over processes, read and written as if they were whole."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor; gathered, on every process, if each holds a part of it."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def write_full_tensor_(tensor: Tensor, value: Tensor) -> None:
    """Write a whole tensor's content, of its shape; each process its part. All processes give the same ``value``."""
    tensor = tensor.detach()
    value = value.to(tensor.dtype)
    if isinstance(tensor, DTensor):
        # every process has the value: nothing needs to be sent
        part = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
        tensor.to_local().copy_(part.to_local())
    else:
        tensor.copy_(value)
