"""SaRA: the weights of smallest absolute value train (Hu et al., ICLR 2025)."""

from .config import SaRAConfig, sara_learning_rate
from .model import SaRALinear, SaRAModel

__all__ = ["SaRAConfig", "SaRALinear", "SaRAModel", "sara_learning_rate"]
