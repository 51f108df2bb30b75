"""The ops as Triton kernels for CUDA tensors; with ``TRITON_INTERPRET=1`` on the CPU too, for tests.

A module is imported only when its kernel is needed: Triton is optional, and compilation takes seconds.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from types import ModuleType
from typing import Any

import torch

# A kernel to compile ahead of time, its argument types and its constants.
Variant = tuple[Any, dict[str, str], dict[str, Any]]


@functools.cache
def installed() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton interprets its kernels in Python, for tensors of any device."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def usable(device: torch.device) -> bool:
    """Whether the kernels can run on tensors of this device."""
    return installed() and (device.type == "cuda" or interpreted())


def kernels(name: str) -> ModuleType:
    """Import a module of kernels.

    Args:
        name: ``support_grad``, ``support_grad_tiles``, ``entries``, ``masked_dw``, ``delta_matmul``, ``codes`` or
            ``expert_support_grad``.
    """
    return importlib.import_module(f"{__name__}.{name}")
