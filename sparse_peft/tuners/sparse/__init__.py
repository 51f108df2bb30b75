"""Sparse deltas: the weight is trained at a fixed or changing set of entries (SpIEL, SHiRA-style, magnitude, ...)."""

from ..method import Method
from .config import SparseConfig
from .dynamics import ReselectionDynamics
from .layer import SparseEmbedding, SparseLinear
from .model import SparseModel

__all__ = ["SparseConfig", "SparseEmbedding", "SparseLinear", "SparseModel"]

METHOD = Method("sparse", SparseModel, ReselectionDynamics)
