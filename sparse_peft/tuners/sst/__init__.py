"""Sparse Spectral Training: all singular values train, and sampled singular vectors (Zhao et al., ICML 2025)."""

from ..method import Method
from .config import SSTConfig
from .dynamics import SSTDynamics
from .layer import SSTLinear
from .model import SSTModel

__all__ = ["SSTConfig", "SSTLinear", "SSTModel"]

METHOD = Method("sst", SSTModel, SSTDynamics)
