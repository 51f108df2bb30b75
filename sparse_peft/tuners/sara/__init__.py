"""SaRA: the weights of smallest absolute value train (Hu et al., ICLR 2025)."""

from ..method import Method
from .config import SaRAConfig, sara_learning_rate
from .dynamics import SaRADynamics
from .model import SaRAEmbedding, SaRALinear, SaRAModel

__all__ = ["SaRAConfig", "SaRAEmbedding", "SaRALinear", "SaRAModel", "sara_learning_rate"]

METHOD = Method("sara", SaRAModel, SaRADynamics)
