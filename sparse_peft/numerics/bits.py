"""Booleans in one bit each: rows of bytes, highest bit first, padded with zeros to whole bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from .panels import panels


def pack_bits(mask: Tensor) -> Tensor:
    """``(rows, ceil(cols / 8))`` uint8 of a bool ``(rows, cols)``.

    Example:
        >>> import torch
        >>> from sparse_peft.numerics import pack_bits
        >>> pack_bits(torch.tensor([[True, False, True]]))
        tensor([[160]], dtype=torch.uint8)
    """
    rows, cols = mask.shape
    packed = torch.zeros(rows, -(-cols // 8), dtype=torch.uint8, device=mask.device)
    for start, stop in panels(rows, 2 * cols):
        padded = torch.nn.functional.pad(mask[start:stop].to(torch.uint8), (0, -cols % 8)).view(stop - start, -1, 8)
        for place in range(8):
            packed[start:stop] |= padded[..., place] << (7 - place)
    return packed


def unpack_bits(packed: Tensor, cols: int) -> Tensor:
    """Bool ``(rows, cols)``: the reverse of ``pack_bits``."""
    places = torch.arange(7, -1, -1, dtype=torch.uint8, device=packed.device)
    return (packed[..., None] >> places & 1).flatten(1)[:, :cols].to(torch.bool)


def count_bits(packed: Tensor) -> int:
    """Number of bits that are set."""
    total = 0
    for start, stop in panels(packed.shape[0], 16 * packed.shape[1]):
        total += int(unpack_bits(packed[start:stop], 8 * packed.shape[1]).sum())
    return total
