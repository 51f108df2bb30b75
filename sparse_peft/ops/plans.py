"""Which path computes the values' gradient of a support: forced, by structure, or by density."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..support import ChannelSupport, Layout, Support, layout_of
from .backends import forced_backend, kernel_backend, log_once
from .crossover import crossover
from .gradient_paths import MAX_GROUPS_ON_CUDA


@dataclass(frozen=True)
class GradientPlan:
    """How the values' gradient of one support is computed.

    Attributes:
        path: one of ``BACKENDS`` other than ``"auto"``, or ``"channels"`` for whole rows or columns.
        why: the reason in words, for reports.
    """

    path: str
    why: str


def plan_support_grad(support: Support, dtype: torch.dtype, device: torch.device) -> GradientPlan:
    """The path for a support: the forced one, else dense tiles, else by density and the device's crossover.

    Args:
        support: of the stored weight; its plans are cached.
        dtype: of the activations.
        device: of the activations.
    """
    plans = support.derived.setdefault("plans", {})
    key = (forced_backend(), dtype, device)
    if key not in plans:
        plans[key] = _plan(support, dtype, device)
    return plans[key]


def _plan(support: Support, dtype: torch.dtype, device: torch.device) -> GradientPlan:
    if isinstance(support, ChannelSupport):
        kind = "rows" if support.dim == 0 else "columns"
        return GradientPlan("channels", f"{support.count} whole {kind}: one dense product")
    layout = layout_of(support)
    return (
        _forced_plan(support, layout, dtype, device)
        or _tiles_plan(layout, dtype, device)
        or _density_plan(layout.inner, dtype, device)
    )


def _forced_plan(support: Support, layout: Layout, dtype: torch.dtype, device: torch.device) -> GradientPlan | None:
    forced = forced_backend()
    if forced == "tiles" and not layout.groups:
        log_once(
            "the backend 'tiles' is forced, but some supports have no rows that train the same columns: their path is "
            "chosen by density"
        )
        return None
    if forced in ("triton", "cuda"):
        kernel = kernel_backend("support_grad", dtype, device, support.indices.dtype)
        return GradientPlan(kernel or "panels", "forced" if kernel else f"the forced kernels do not take {dtype}")
    return None if forced is None else GradientPlan(forced, "forced")


def _tiles_plan(layout: Layout, dtype: torch.dtype, device: torch.device) -> GradientPlan | None:
    if not layout.groups or layout.tile_cost >= 1:
        return None
    one_launch = kernel_backend("support_grad_tiles", dtype, device) == "triton"
    if device.type != "cpu" and len(layout.groups) > MAX_GROUPS_ON_CUDA and not one_launch:
        return None
    return GradientPlan("tiles", f"{len(layout.groups)} groups of rows that train the same columns")


def _density_plan(support: Support, dtype: torch.dtype, device: torch.device) -> GradientPlan:
    density, on_cpu = support.density, device.type == "cpu"
    kernel = "sampled" if on_cpu else kernel_backend("support_grad", dtype, device, support.indices.dtype)
    if kernel is None:
        return GradientPlan("panels", "no kernel for this device and dtype")
    found = crossover(device, dtype, support.shape, density)
    side = "below" if density <= found.density else "above"
    path = found.path if side == "below" else "panels"
    return GradientPlan(path, f"density {density:.3g} {side} the crossover {found.density:.3g} ({found.source})")
