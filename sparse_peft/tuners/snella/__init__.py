"""SNELL and SNELLA: a kernelised, competing, sparse delta (Shen et al., NeurIPS 2024)."""

from ..method import Method
from .config import SnellaConfig
from .dynamics import SnellaDynamics
from .layer import SnellaLinear
from .model import SnellaModel

__all__ = ["SnellaConfig", "SnellaLinear", "SnellaModel"]

METHOD = Method("snella", SnellaModel, SnellaDynamics)
