"""The layer of a sparse delta."""

from __future__ import annotations

from ..delta import SparseDelta
from ..delta_layer import SparseTunerLayer
from .config import SparseConfig


class SparseLinear(SparseTunerLayer[SparseDelta]):
    """A linear layer with trained entries; see ``SparseTunerLayer``."""

    config_cls = SparseConfig
