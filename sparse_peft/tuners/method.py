"""A sparse fine-tuning method as the sum of its classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..dynamics.protocol import Dynamics
from .base_config import BaseSparseConfig
from .base_model import BaseSparseModel


@dataclass(frozen=True)
class Method:
    """One method, named ``METHOD`` in the ``__init__`` of its folder.

    Args:
        name: its name on a command line and in reports, which is that of its folder.
        model_class: PEFT's tuner, which knows its layer and config classes.
        dynamics_class: what changes during training besides the values.

    Example:
        >>> from sparse_peft.tuners import sora
        >>> sora.METHOD.name, sora.METHOD.config_class.__name__, sora.METHOD.peft_type
        ('sora', 'SoRAConfig', 'SPARSE_PEFT_SORA')
    """

    name: str
    model_class: type[BaseSparseModel]
    dynamics_class: type[Dynamics[Any, Any]] = Dynamics

    @property
    def config_class(self) -> type[BaseSparseConfig]:
        """What a user configures."""
        return self.model_class.layer_cls.config_cls

    @property
    def peft_type(self) -> str:
        """The name of its PEFT type.

        It starts with the package's name, so that the bare ``KeyError`` that PEFT raises without the package names
        what to import, and so that no method of a later PEFT has it.
        """
        return self.config_class.method

    @property
    def prefix(self) -> str:
        """What the names of its parameters start with."""
        return self.model_class.prefix
