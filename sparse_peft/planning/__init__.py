"""What a training would take: trained parameters, memory and time, found out without the model's weights."""

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
