"""The layer of a sparse delta."""

from __future__ import annotations

from ..delta_layer import SparseTunerLayer
from .config import SparseConfig


class SparseLinear(SparseTunerLayer):
    """A linear layer with trained entries; see ``SparseTunerLayer``."""

    config_cls = SparseConfig
