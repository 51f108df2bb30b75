"""Sparse fine-tuning for Hugging Face PEFT. Importing the package registers its methods with PEFT."""

from .numerics import panel_limit
from .ops import use_backend
from .registry import register_all
from .tuners.base_model import base_weights
from .tuners.files.card import guard_model_cards
from .tuners.files.checks import guard_adapter_writes
from .tuners.selection import select_support

register_all()
guard_adapter_writes()
guard_model_cards()

from .training.adamw import SparseAdamW  # noqa: E402
from .training.callback import SparsityCallback  # noqa: E402
from .training.controller import SparsityController  # noqa: E402
from .training.sm3 import SM3  # noqa: E402
from .tuners.s2ft import S2FTConfig, S2FTLinear, S2FTModel  # noqa: E402
from .tuners.sara import SaRAConfig, SaRALinear, SaRAModel, sara_learning_rate  # noqa: E402
from .tuners.sketch import SketchConfig, SketchLinear, SketchModel, sketch_model  # noqa: E402
from .tuners.sltrain import SLTrainConfig, SLTrainLinear, SLTrainModel, build_for_pretraining  # noqa: E402
from .tuners.snella import SnellaConfig, SnellaLinear, SnellaModel  # noqa: E402
from .tuners.sora import SoRAConfig, SoRALinear, SoRAModel, rewarmed_schedule  # noqa: E402
from .tuners.sparse import SparseConfig, SparseLinear, SparseModel  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "SM3",
    "S2FTConfig",
    "S2FTLinear",
    "S2FTModel",
    "SLTrainConfig",
    "SLTrainLinear",
    "SLTrainModel",
    "SaRAConfig",
    "SaRALinear",
    "SaRAModel",
    "SketchConfig",
    "SketchLinear",
    "SketchModel",
    "SnellaConfig",
    "SnellaLinear",
    "SnellaModel",
    "SoRAConfig",
    "SoRALinear",
    "SoRAModel",
    "SparseAdamW",
    "SparseConfig",
    "SparseLinear",
    "SparseModel",
    "SparsityCallback",
    "SparsityController",
    "__version__",
    "base_weights",
    "build_for_pretraining",
    "panel_limit",
    "rewarmed_schedule",
    "sara_learning_rate",
    "select_support",
    "sketch_model",
    "use_backend",
]
