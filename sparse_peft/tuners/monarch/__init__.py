"""Monarch: two block-diagonal factors beside the weight (Dao et al. 2022; MoRe, Tan et al. 2024)."""

from ..method import Method
from .config import MonarchConfig
from .layer import MonarchLinear
from .model import MonarchModel
from .projection import MonarchFactors, monarch_project

__all__ = ["MonarchConfig", "MonarchFactors", "MonarchLinear", "MonarchModel", "monarch_project"]

METHOD = Method("monarch", MonarchModel)
