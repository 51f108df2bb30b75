"""Proximal operators of the L1 norm."""

from __future__ import annotations

import torch
from torch import Tensor


def soft_threshold(z: Tensor, threshold: Tensor | float) -> Tensor:
    """``sign(z) max(|z| - threshold, 0)``, the minimum over ``w`` of ``(w - z)^2 / 2 + threshold |w|``."""
    return z.sign() * (z.abs() - threshold).clamp_(min=0)


def reference_threshold(z: Tensor, threshold: Tensor | float) -> Tensor:
    """What SoRA's published code does in its place: it looks again at what it has shrunk already.

    So everything below twice the threshold becomes 0, but for what is equal to the threshold, which stays.
    """
    size = z.abs()
    shrunk = torch.where(size >= 2 * threshold, z - z.sign() * threshold, torch.zeros_like(z))
    return torch.where(size == threshold, z, shrunk)


PROXIMAL_OPERATORS = {"soft": soft_threshold, "reference": reference_threshold}
"""The operators by name, ``operator(values, threshold)``."""
