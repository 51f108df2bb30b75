"""The names of ``sparse_peft.procedures`` for type checkers and editors; at run time its files are looked through."""

from .distillation import DistillationLoss as DistillationLoss
from .driver import StepDriver as StepDriver
from .expansion import Expansion as Expansion
from .expansion import expand_layers as expand_layers
from .fisher_anchor import FisherAnchor as FisherAnchor
from .gradient_mask import GradientMask as GradientMask
from .importance_rate import ImportanceLearningRate as ImportanceLearningRate
from .layer_sampling import LayerSampling as LayerSampling
from .procedure import Procedure as Procedure
from .procedure import TrainingRun as TrainingRun
from .samples import SampleHistory as SampleHistory
from .split_merge import SplitMerge as SplitMerge
