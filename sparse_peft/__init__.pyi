"""The names of ``sparse_peft`` for type checkers and editors; at run time they are derived from the methods."""

from .numerics import panel_limit as panel_limit
from .ops import use_backend as use_backend
from .registry import register_method as register_method
from .training.adamw import SparseAdamW as SparseAdamW
from .training.attach import attach as attach
from .training.callback import SparsityCallback as SparsityCallback
from .training.controller import SparsityController as SparsityController
from .training.sm3 import SM3 as SM3
from .training.step_in_backward import StepInBackward as StepInBackward
from .training.step_in_backward import step_in_backward as step_in_backward
from .tuners.method import Method as Method
from .tuners.residency import base_weights as base_weights
from .tuners.s2ft import S2FTConfig as S2FTConfig
from .tuners.s2ft import S2FTLinear as S2FTLinear
from .tuners.s2ft import S2FTModel as S2FTModel
from .tuners.sara import SaRAConfig as SaRAConfig
from .tuners.sara import SaRAEmbedding as SaRAEmbedding
from .tuners.sara import SaRALinear as SaRALinear
from .tuners.sara import SaRAModel as SaRAModel
from .tuners.sara import sara_learning_rate as sara_learning_rate
from .tuners.selection import select_support as select_support
from .tuners.sketch import SketchConfig as SketchConfig
from .tuners.sketch import SketchLinear as SketchLinear
from .tuners.sketch import SketchModel as SketchModel
from .tuners.sketch import sketch_model as sketch_model
from .tuners.sltrain import SLTrainConfig as SLTrainConfig
from .tuners.sltrain import SLTrainLinear as SLTrainLinear
from .tuners.sltrain import SLTrainModel as SLTrainModel
from .tuners.sltrain import build_for_pretraining as build_for_pretraining
from .tuners.snella import SnellaConfig as SnellaConfig
from .tuners.snella import SnellaLinear as SnellaLinear
from .tuners.snella import SnellaModel as SnellaModel
from .tuners.sora import SoRAConfig as SoRAConfig
from .tuners.sora import SoRALinear as SoRALinear
from .tuners.sora import SoRAModel as SoRAModel
from .tuners.sora import rewarmed_schedule as rewarmed_schedule
from .tuners.sparse import SparseConfig as SparseConfig
from .tuners.sparse import SparseEmbedding as SparseEmbedding
from .tuners.sparse import SparseLinear as SparseLinear
from .tuners.sparse import SparseModel as SparseModel

__version__: str
