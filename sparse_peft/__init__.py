"""Sparse fine-tuning for Hugging Face PEFT. Importing the package registers its methods with PEFT.

``__init__.pyi`` has the same names for type checkers and editors; a test compares the two.
"""

from _sparse_peft_startup.spelling import did_you_mean

from . import tuners
from .compat import call_file_hooks
from .numerics import panel_limit
from .ops import use_backend
from .other_names import other_name
from .registry import register_folders, register_method
from .training.adamw import SparseAdamW
from .training.attach import attach
from .training.callback import SparsityCallback
from .training.controller import SparsityController
from .training.sm3 import SM3
from .training.step_in_backward import StepInBackward, step_in_backward
from .tuners.files.card import guard_model_cards
from .tuners.files.refused_loads import guard_refused_loads
from .tuners.files.saved_embeddings import guard_saved_embeddings
from .tuners.files.writes import guard_adapter_writes
from .tuners.method import Method
from .tuners.residency import base_weights
from .tuners.selection import select_support
from .version import __version__

_of_methods = register_folders(tuners)
globals().update(_of_methods)
call_file_hooks()
guard_adapter_writes()
guard_model_cards()
guard_refused_loads()
guard_saved_embeddings()


def __getattr__(name: str) -> object:
    advice = other_name(name)
    if advice is not None:
        # of an AttributeError, `from sparse_peft import SpIELConfig` would not show the text
        raise ImportError(f"{__name__!r} has no {name!r}: use {advice}", name=__name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}{did_you_mean([name], __all__)}")


__all__ = [
    "SM3",
    "Method",
    "SparseAdamW",
    "SparsityCallback",
    "SparsityController",
    "StepInBackward",
    "__version__",
    "attach",
    "base_weights",
    "panel_limit",
    "register_method",
    "select_support",
    "step_in_backward",
    "use_backend",
    *_of_methods,
]
