"""SoRA: low rank whose ranks a gate switches off (Ding et al., EMNLP 2023)."""

from ..method import Method
from .config import SoRAConfig
from .dynamics import SoRADynamics
from .layer import SoRALinear
from .model import SoRAModel
from .penalty import rewarmed_schedule

__all__ = ["SoRAConfig", "SoRALinear", "SoRAModel", "rewarmed_schedule"]

METHOD = Method("sora", SoRAModel, SoRADynamics)
