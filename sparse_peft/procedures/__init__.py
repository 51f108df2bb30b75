"""Procedures around the training of any PEFT adapter: layer sampling, split and merge, rates by importance, anchors.

Each is a file of this folder with a subclass of [`Procedure`][sparse_peft.procedures.Procedure]; no other place knows
it. ``__init__.pyi`` has the same names for type checkers; a test compares the two.
"""

from importlib import import_module
from pkgutil import iter_modules

from .distillation import DistillationLoss
from .driver import StepDriver
from .expansion import Expansion, expand_layers
from .procedure import Procedure, TrainingRun
from .samples import SampleHistory


def _procedures() -> dict[str, type[Procedure]]:
    """``{name: class}`` of the procedures in this folder's files."""
    modules = [import_module(f"{__name__}.{file.name}") for file in iter_modules(__path__)]
    kinds = [kind for module in modules for kind in vars(module).values() if isinstance(kind, type)]
    return {kind.__name__: kind for kind in kinds if issubclass(kind, Procedure)}


_found = _procedures()
globals().update(_found)

__all__ = [
    "DistillationLoss",
    "Expansion",
    "Procedure",
    "SampleHistory",
    "StepDriver",
    "TrainingRun",
    "expand_layers",
    *(name for name in _found if name != "Procedure"),
]
