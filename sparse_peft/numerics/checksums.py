"""Tensors' bits, and checksums of them."""

from __future__ import annotations

import torch
from torch import Tensor

from .panels import panels

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ODD = 0x9E3779B97F4A7C15 - 2**64  # 2**64 over the golden ratio, as int64
_MASK = 2**64 - 1


def bits(tensor: Tensor) -> Tensor:
    """The same memory as integers of the dtype's size, which are equal where all bits are."""
    return tensor.view(_BITS[tensor.element_size()])


def checksum(tensor: Tensor) -> int:
    """A number that changes with the bits of any entry, and with the entries' order.

    Example:
        >>> import torch
        >>> from sparse_peft.numerics import checksum
        >>> checksum(torch.tensor([1.0, 2.0])) == checksum(torch.tensor([2.0, 1.0]))
        False
    """
    if tensor.is_meta:
        return 0
    rows = tensor.detach()
    rows = rows.view(1, -1) if rows.ndim < 2 else rows
    weights = torch.arange(rows[0].numel(), device=rows.device).mul_(2).add_(1).mul_(_ODD)
    total = 0
    for start, stop in panels(len(rows), 2 * torch.int64.itemsize * weights.numel()):
        sums = (bits(rows[start:stop].reshape(stop - start, -1)) * weights).sum(1)
        total += int((sums * (2 * torch.arange(start, stop, device=rows.device) + 1)).sum())
    return total & _MASK
