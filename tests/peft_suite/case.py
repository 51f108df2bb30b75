"""One method under PEFT's own tests; the method's tests have it as ``CASE`` in a file ``peft_case.py``."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any


@dataclasses.dataclass(frozen=True)
class Case:
    """One config class under test.

    Attributes:
        name: for the command line and the tests' ids.
        config: ``module:class``, imported late, so that a baseline runs where sparse_peft does not import.
        kwargs: arguments of every case; the 5x1, 10x20 and 20x2 layers of upstream's models must get a few entries.
        other: a second, different setting, for tests with two adapters.
        conv1d: whether transformers' Conv1D can be a target.
        convolutions: whether torch's convolutions can be targets.
        groups: whether convolutions of several groups can be.
        embeddings: whether ``nn.Embedding`` can be a target.
        mixed_batches: whether ``adapter_names=`` is supported.
        low_rank: whether the output of the adapter rounds as LoRA's does, beside the base's and not within its weight.
        baseline: runs only when named; built into PEFT, to show what upstream's tests do without anything of ours.
    """

    name: str
    config: str
    kwargs: dict[str, Any]
    other: dict[str, Any]
    conv1d: bool = True
    convolutions: bool = True
    groups: bool = True
    embeddings: bool = False
    mixed_batches: bool = True
    low_rank: bool = False
    baseline: bool = False

    @property
    def config_cls(self) -> type:
        module, _, attribute = self.config.partition(":")
        return getattr(importlib.import_module(module), attribute)
