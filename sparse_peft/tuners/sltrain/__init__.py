"""SLTrain: sparse plus low rank, beside a base weight or in its place (Han et al., NeurIPS 2024)."""

from ..method import Method
from ..sparse.dynamics import ReselectionDynamics
from .config import SLTrainConfig
from .layer import SLTrainLinear
from .model import SLTrainModel
from .scratch import build_for_pretraining

__all__ = ["SLTrainConfig", "SLTrainLinear", "SLTrainModel", "build_for_pretraining"]

METHOD = Method("sltrain", SLTrainModel, ReselectionDynamics)
