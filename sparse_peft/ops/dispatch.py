"""Which implementation of an op runs: chosen by measured crossovers, or forced by the user.

``SPARSE_PEFT_BACKEND`` forces one for the process, :func:`use_backend` for a block. Every implementation gives the
same numbers up to the order of summation; the choice changes only speed and memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

BACKENDS = ("auto", "panels", "sampled")

# Density up to which the CPU's sampled product beats a dense panel product: it passes 1.0 at 15-20 % density.
SAMPLED_MAX_DENSITY = 0.12

_forced: str | None = None


def _checked(name: str, where: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{where}={name!r} is not a backend of sparse_peft; choose one of {', '.join(BACKENDS)}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one implementation inside the block: ``"panels"``, ``"sampled"``, or ``"auto"`` for the default choice.

    Raises:
        ValueError: ``name`` is none of :data:`BACKENDS`.
    """
    global _forced
    previous, _forced = _forced, _checked(name, "use_backend(name)")
    try:
        yield
    finally:
        _forced = previous


def support_grad_backend(density: float, device: torch.device) -> str:
    """``"sampled"`` or ``"panels"`` for the values' gradient of a support of this density on this device."""
    forced = _forced or _checked(os.environ.get("SPARSE_PEFT_BACKEND", "auto"), "environment SPARSE_PEFT_BACKEND")
    if forced != "auto":
        return forced
    return "sampled" if device.type == "cpu" and density <= SAMPLED_MAX_DENSITY else "panels"
