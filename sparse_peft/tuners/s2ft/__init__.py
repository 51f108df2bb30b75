"""S2FT: whole input or output channels of the layers train (Yang et al., NeurIPS 2024)."""

from ..method import Method
from .config import S2FTConfig
from .layer import S2FTLinear
from .model import S2FTModel

__all__ = ["S2FTConfig", "S2FTLinear", "S2FTModel"]

METHOD = Method("s2ft", S2FTModel)
