"""Proximal operators of the L1 norm, as in SoRA (https://arxiv.org/abs/2311.11696)."""

from __future__ import annotations

import torch
from torch import Tensor


def soft_threshold(z: Tensor, threshold: Tensor | float) -> Tensor:
    """``sign(z) max(|z| - threshold, 0)``, the minimum over ``w`` of ``(w - z)^2 / 2 + threshold |w|``."""
    return z.sign() * (z.abs() - threshold).clamp_(min=0)


def reference_threshold(z: Tensor, threshold: Tensor | float) -> Tensor:
    """The variant in SoRA's published code, which compares the values with the threshold again after shrinking.

    Values below twice the threshold become 0, except for those equal to the threshold, which do not change.
    """
    size = z.abs()
    shrunk = torch.where(size >= 2 * threshold, z - z.sign() * threshold, torch.zeros_like(z))
    return torch.where(size == threshold, z, shrunk)


PROXIMAL_OPERATORS = {"soft": soft_threshold, "reference": reference_threshold}
"""The operators by name, ``operator(values, threshold)``."""
