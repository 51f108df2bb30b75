"""SketchTune: weights that share a code share a trained number (Zhang et al., ICML 2025)."""

from ..method import Method
from .calibration import sketch_model
from .config import SketchConfig
from .layer import SketchLinear
from .model import SketchModel

__all__ = ["SketchConfig", "SketchLinear", "SketchModel", "sketch_model"]

METHOD = Method("sketch", SketchModel)
