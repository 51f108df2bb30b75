"""SNELL and SNELLA: a kernelised, competing, sparse delta (Shen et al., NeurIPS 2024)."""

from .config import SnellaConfig
from .layer import SnellaLinear
from .model import SnellaModel

__all__ = ["SnellaConfig", "SnellaLinear", "SnellaModel"]
