"""Cost of a training: trained parameters, memory and time, without the model's weights."""

from .communication import STRATEGIES, DividedRun, Traffic, expected_own_bytes, reselection_traffic, step_traffic
from .plan import PlanOptions, TrainingPlan, plan_training
from .sizes import FORMATS, OPTIMIZERS, LayerKind
from .step import GPU_SIZES, Need

__all__ = [
    "FORMATS",
    "GPU_SIZES",
    "OPTIMIZERS",
    "STRATEGIES",
    "DividedRun",
    "LayerKind",
    "Need",
    "PlanOptions",
    "Traffic",
    "TrainingPlan",
    "expected_own_bytes",
    "plan_training",
    "reselection_traffic",
    "step_traffic",
]
