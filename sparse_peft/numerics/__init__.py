"""Numerical helpers that know no layer: panels, top-k, order statistics, random numbers, k-means."""

from .order_statistics import order_statistics
from .panels import panel_bytes, panel_limit, panels
from .rng import sample_without_replacement, uniform
from .topk import RunningTopK, topk_indices

__all__ = [
    "RunningTopK",
    "order_statistics",
    "panel_bytes",
    "panel_limit",
    "panels",
    "sample_without_replacement",
    "topk_indices",
    "uniform",
]
