"""The names of ``sparse_peft.procedures`` for type checkers and editors; at run time its files are looked through."""

from .driver import StepDriver as StepDriver
from .procedure import Procedure as Procedure
from .procedure import TrainingRun as TrainingRun
