"""Which implementation of an op runs: chosen by measured crossovers, or forced by the user.

``SPARSE_PEFT_BACKEND`` forces one for the process, [`use_backend`][sparse_peft.use_backend] for a block. Every
implementation gives the same numbers up to the order of summation; the choice changes only speed and memory.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ..support import ChannelSupport, Support, layout_of
from . import cuda_kernels, triton_kernels
from .crossover import crossover

logger = logging.getLogger(__name__)

# "panels", "sampled" and "tiles" are PyTorch's own operations; "triton" and "cuda" this package's kernels.
BACKENDS = ("auto", "panels", "sampled", "tiles", "triton", "cuda")

# More groups than this, and launching a product for each takes a GPU longer than one dense product.
MAX_GROUPS_ON_CUDA = 16

_forced: str | None = None
_logged: set[str] = set()


def log_once(reason: str) -> None:
    if reason not in _logged:
        _logged.add(reason)
        logger.info(reason)


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
            ``"auto"`` for the default choice. An op that has no such implementation uses PyTorch's operations.

    Raises:
        ValueError: ``name`` is none of ``BACKENDS``.
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


def kernel_backend(op: str, dtype: torch.dtype, device: torch.device, index: torch.dtype = torch.int32) -> str | None:
    """``"cuda"``, ``"triton"`` or None: which of this package's kernels run an op on such tensors.

    Args:
        op: ``"scatter_add"``, ``"write_entries"`` and ``"sddmm"`` have a CUDA C++ kernel; every op has a Triton one.
        dtype: of the floats.
        device: of all tensors.
        index: dtype of the positions.

    Raises:
        RuntimeError: a backend is forced that cannot run on this device.
    """
    forced = forced_backend()
    if forced not in (None, "triton", "cuda") or (device.type == "cpu" and forced is None):
        return None
    if forced == "triton" and not triton_kernels.usable(device):
        raise RuntimeError(
            f"the backend 'triton' is forced, but the tensors are on {device}"
            + ("" if triton_kernels.installed() else " and Triton is not installed")
            + "; Triton's kernels run on CUDA tensors, and on the CPU under TRITON_INTERPRET=1 for tests"
        )
    if forced == "cuda" and device.type != "cuda":
        raise RuntimeError(f"the backend 'cuda' is forced, but the tensors are on {device}; it runs on CUDA tensors")
    if dtype not in cuda_kernels.FLOATS:
        return None  # the kernels sum in float32, which would round float64
    if forced != "triton" and op in ("scatter_add", "write_entries", "sddmm"):
        if cuda_kernels.usable(op, dtype, index, device):
            return "cuda"
    if forced != "cuda" and triton_kernels.usable(device):
        return "triton"
    return None


@dataclass(frozen=True)
class Plan:
    """How the values' gradient of one support is computed.

    Attributes:
        path: one of ``BACKENDS``, without ``"auto"``, or ``"channels"``, which needs no choice.
        why: in words, for reports.
    """

    path: str
    why: str


def plan_support_grad(support: Support, dtype: torch.dtype, device: torch.device) -> Plan:
    """The path for a support: what is forced, else dense tiles, else by density and the device's crossover."""
    plans = support.__dict__.setdefault("_plans", {})
    key = (forced_backend(), dtype, device)
    if key not in plans:
        plans[key] = _plan(support, dtype, device)
    return plans[key]


def _plan(support: Support, dtype: torch.dtype, device: torch.device) -> Plan:
    if isinstance(support, ChannelSupport):
        kind = "rows" if support.dim == 0 else "columns"
        return Plan("channels", f"{support.count} whole {kind}: one dense product")
    layout = layout_of(support)
    density = layout.inner.density
    forced = forced_backend()
    if forced == "tiles" and not layout.groups:
        log_once("the backend 'tiles' is forced, but some supports have no rows that go together: chosen by density")
        forced = None
    if forced in ("triton", "cuda"):
        kernel = kernel_backend("sddmm", dtype, device, support.indices.dtype)
        return Plan(kernel or "panels", "forced" if kernel else f"the forced kernels do not take {dtype}")
    if forced is not None:
        return Plan(forced, "forced")
    few_launches = len(layout.groups) <= MAX_GROUPS_ON_CUDA or kernel_backend("groups", dtype, device) == "triton"
    if layout.groups and layout.tile_cost < 1 and (device.type == "cpu" or few_launches):
        return Plan("tiles", f"{len(layout.groups)} groups of rows that train the same columns")
    kernel = "sampled" if device.type == "cpu" else kernel_backend("sddmm", dtype, device, support.indices.dtype)
    if kernel is None:
        return Plan("panels", "no kernel for this device and dtype")
    found = crossover(device, dtype, density)
    side = "below" if density <= found.density else "above"
    path = found.path if side == "below" else "panels"
    return Plan(path, f"density {density:.3g} {side} the crossover {found.density:.3g} ({found.source})")
