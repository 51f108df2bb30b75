"""A toy method in a folder of its own: a band of diagonals of each weight trains, and moves during training.

The weights of ``width`` neighbouring diagonals train. Each layer draws its first diagonal at random.
"""

from sparse_peft import Method, register_method

from .config import BandConfig
from .dynamics import BandDynamics
from .model import BandLinear, BandModel

__all__ = ["BandConfig", "BandLinear", "BandModel"]

METHOD = Method("band", BandModel, BandDynamics)
register_method(METHOD)
