"""Sorted vectors."""

from __future__ import annotations

import torch
from torch import Tensor


def among(numbers: Tensor, ascending: Tensor) -> Tensor:
    """Whether each of some numbers is in a vector: bool of the numbers' shape.

    Args:
        numbers: of the vector's dtype and device.
        ascending: ``(n,)`` in ascending order.

    Example:
        >>> import torch
        >>> from sparse_peft.numerics import among
        >>> among(torch.tensor([4, 5]), torch.tensor([1, 4, 9])).tolist()
        [True, False]
    """
    if ascending.numel() == 0:
        return torch.zeros_like(numbers, dtype=torch.bool)
    slots = torch.searchsorted(ascending, numbers).clamp_(max=ascending.numel() - 1)
    return ascending[slots] == numbers
