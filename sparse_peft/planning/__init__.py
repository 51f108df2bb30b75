"""Cost of a training: trained parameters, memory and time, without the model's weights."""

from .plan import PlanOptions, TrainingPlan, plan_training
from .sizes import FORMATS, OPTIMIZERS, LayerKind
from .step import Need

__all__ = [
    "FORMATS",
    "OPTIMIZERS",
    "LayerKind",
    "Need",
    "PlanOptions",
    "TrainingPlan",
    "plan_training",
]
