"""Sparse deltas: the weight is trained at a fixed or changing set of entries (SpIEL, SHiRA-style, magnitude, ...)."""

from .config import SparseConfig
from .layer import SparseLinear
from .model import SparseModel

__all__ = ["SparseConfig", "SparseLinear", "SparseModel"]
