"""SketchTune: weights that share a code share a trained number (Zhang et al., ICML 2025)."""

from .calibration import sketch_model
from .config import SketchConfig
from .layer import SketchLinear
from .model import SketchModel
from .sidecar import read_sketches, write_sketches

__all__ = ["SketchConfig", "SketchLinear", "SketchModel", "read_sketches", "sketch_model", "write_sketches"]
