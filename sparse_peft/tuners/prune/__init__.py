"""Sparse-aware fine-tuning: the weight in use is a mask times base plus delta."""

from ..method import Method
from .config import PruneConfig
from .dynamics import PruneDynamics
from .layer import PruneLinear
from .masks import adapter_masks, release_masks, set_masks
from .model import PruneModel

__all__ = ["PruneConfig", "PruneLinear", "PruneModel", "adapter_masks", "release_masks", "set_masks"]

METHOD = Method("prune", PruneModel, PruneDynamics)
