"""SoRA: low rank whose ranks a gate switches off (Ding et al., EMNLP 2023)."""

from .config import SoRAConfig
from .layer import SoRALinear
from .model import SoRAModel
from .penalty import rewarmed_schedule

__all__ = ["SoRAConfig", "SoRALinear", "SoRAModel", "rewarmed_schedule"]
