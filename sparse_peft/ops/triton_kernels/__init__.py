"""The ops as Triton kernels, for CUDA tensors; under ``TRITON_INTERPRET=1`` on the CPU too, for tests.

Nothing here is imported before a kernel is asked for: Triton is optional, and compiles for seconds.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from types import ModuleType

import torch


@functools.cache
def installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on any device's tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def usable(device: torch.device) -> bool:
    """Whether the kernels can run on tensors of this device."""
    return installed() and (device.type == "cuda" or interpreted())


def kernels(name: str) -> ModuleType:
    """The module of this name.

    Args:
        name: ``support_grad``, ``support_grad_tiles``, ``entries``, ``masked_dw``, ``delta_matmul`` or ``codes``.
    """
    return importlib.import_module(f"{__name__}.{name}")
