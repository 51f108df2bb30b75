"""Cost of a training: trained parameters, memory and time, without the model's weights."""

from .plan import PlanOptions, TrainingPlan, plan_training
from .sizes import FORMATS, OPTIMIZERS, LayerKind
from .step import GPU_SIZES, Need

__all__ = [
    "FORMATS",
    "GPU_SIZES",
    "OPTIMIZERS",
    "LayerKind",
    "Need",
    "PlanOptions",
    "TrainingPlan",
    "plan_training",
]
