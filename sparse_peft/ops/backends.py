"""Which implementation of an op runs: the default for the device, or one that the user forces.

The environment variable ``SPARSE_PEFT_BACKEND`` forces one for the process,
[`use_backend`][sparse_peft.use_backend] for a block of code. All implementations give the same results up to the order
of summation; the choice affects speed and memory only.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from . import cuda_kernels, triton_kernels

logger = logging.getLogger(__name__)

# "panels", "sampled" and "tiles" use PyTorch's own operations; "triton" and "cuda" are kernels of this package.
BACKENDS = ("auto", "panels", "sampled", "tiles", "triton", "cuda")

_forced: str | None = None
_logged: set[str] = set()


def log_once(message: str) -> None:
    """Log a message at level INFO, once per process."""
    if message not in _logged:
        _logged.add(message)
        logger.info(message)


def _checked(name: str, where: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{where}={name!r} is not a backend of sparse_peft; choose one of {', '.join(BACKENDS)}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one implementation inside the block.

    Args:
        name: ``"panels"`` (rows of the dense gradient, in PyTorch), ``"sampled"`` (PyTorch's sampled product),
            ``"tiles"`` (dense products of row groups), ``"triton"`` or ``"cuda"`` (kernels for CUDA tensors), or
            ``"auto"`` for the default choice. An op without this implementation uses PyTorch's operations.

    Raises:
        ValueError: ``name`` is none of ``BACKENDS``.

    Example:
        >>> import torch
        >>> import sparse_peft
        >>> from sparse_peft.ops import plan_support_grad
        >>> from sparse_peft.support import Support
        >>> support = Support.random((100, 100), 100, seed=0, name="layer")
        >>> with sparse_peft.use_backend("panels"):
        ...     plan_support_grad(support, torch.float32, torch.device("cpu")).path
        'panels'
    """
    global _forced
    previous, _forced = _forced, _checked(name, "use_backend(name)")
    try:
        yield
    finally:
        _forced = previous


def forced_backend() -> str | None:
    """The backend that the user forces, or None."""
    name = _forced or _checked(os.environ.get("SPARSE_PEFT_BACKEND", "auto"), "environment SPARSE_PEFT_BACKEND")
    return None if name == "auto" else name


def _check_device(forced: str | None, device: torch.device) -> None:
    if forced == "triton" and not triton_kernels.usable(device):
        raise RuntimeError(
            f"the backend 'triton' is forced, but the tensors are on {device}"
            + ("" if triton_kernels.installed() else " and Triton is not installed")
            + "; Triton's kernels run on CUDA tensors, and on the CPU under TRITON_INTERPRET=1 for tests"
        )
    if forced == "cuda" and device.type != "cuda":
        raise RuntimeError(f"the backend 'cuda' is forced, but the tensors are on {device}; it runs on CUDA tensors")


def kernels_possible(device: torch.device) -> bool:
    """Whether any op may have a kernel on this device."""
    return device.type != "cpu" or forced_backend() is not None


def kernel_backend(op: str, dtype: torch.dtype, device: torch.device, index: torch.dtype = torch.int32) -> str | None:
    """The kernel that runs an op: ``"cuda"``, ``"triton"``, or None for PyTorch's operations.

    Args:
        op: name of the op. Those in ``cuda_kernels.OPS`` have a CUDA C++ kernel; every op has a Triton kernel.
        dtype: of the floats.
        device: of all tensors.
        index: dtype of the positions.

    Raises:
        RuntimeError: the forced backend cannot run on this device.
    """
    forced = forced_backend()
    if forced not in (None, "triton", "cuda") or not kernels_possible(device):
        return None
    _check_device(forced, device)
    if dtype not in cuda_kernels.FLOATS:
        return None  # kernels sum in float32, which would round float64
    if forced != "triton" and op in cuda_kernels.OPS and cuda_kernels.usable(op, dtype, index, device):
        return "cuda"
    if forced != "cuda" and triton_kernels.usable(device):
        return "triton"
    return None
