"""What is put in the place of upstream's case lists: one line a method, one line a layout."""

from __future__ import annotations

import dataclasses
import importlib
import os
from typing import Any

METHODS_VARIABLE = "SPARSE_PEFT_SUITE_METHODS"


@dataclasses.dataclass(frozen=True)
class Method:
    """One config class under test.

    Attributes:
        name: for the command line and the tests' ids.
        config: ``module:class``, imported late, so that a baseline runs where sparse_peft does not import.
        kwargs: arguments of every case; the 5x1, 10x20 and 20x2 layers of upstream's models must get a few entries.
        other: a second, different setting, for tests with two adapters.
        conv1d: whether transformers' Conv1D can be a target.
        convolutions: whether torch's convolutions can be targets.
        groups: whether convolutions of several groups can be.
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
    mixed_batches: bool = True
    low_rank: bool = False
    baseline: bool = False

    @property
    def config_cls(self) -> type:
        module, _, attribute = self.config.partition(":")
        return getattr(importlib.import_module(module), attribute)


METHODS = (
    Method("sparse", "sparse_peft:SparseConfig", {"density": 0.4}, {"density": 0.2}),
    Method("s2ft", "sparse_peft:S2FTConfig", {"ratio": 0.4}, {"ratio": 0.2}, groups=False),
    Method(
        "sara",
        "sparse_peft:SaRAConfig",
        {"density": 0.4, "progressive": None, "nuclear_weight": 0.0},
        {"density": 0.2},
    ),
    Method(
        "sora",
        "sparse_peft:SoRAConfig",
        {"r": 4, "alpha": 4, "penalty": 0.0},
        {"r": 2, "alpha": 2},
        groups=False,
        low_rank=True,
    ),
    Method(
        "sltrain",
        "sparse_peft:SLTrainConfig",
        {"r": 3, "alpha": 3, "density": 0.2},
        {"r": 2, "density": 0.1},
        groups=False,
        low_rank=True,
    ),
    Method("snella", "sparse_peft:SnellaConfig", {"r": 4, "sparsity": 0.2}, {"r": 2, "sparsity": 0.5}, groups=False),
    Method("sketch", "sparse_peft:SketchConfig", {"bits": 2}, {"bits": 3}, convolutions=False, groups=False),
    Method(
        "shira",
        "peft:ShiraConfig",
        {"r": 1},
        {"r": 1},
        conv1d=False,
        convolutions=False,
        groups=False,
        mixed_batches=False,
        baseline=True,
    ),
)

# (name, upstream's model, keyword arguments, what it needs of a method besides linear layers)
CUSTOM_LAYOUTS = (
    ("MLP, one layer by name", "MLP", {"target_modules": "lin0"}, None),
    ("MLP, the small layer", "MLP", {"target_modules": ["lin1"]}, None),
    ("MLP, two layers", "MLP", {"target_modules": ["lin0", "lin1"]}, None),
    ("MLP, modules_to_save", "MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}, None),
    ("Embedding and Conv1D", "EmbConv1D", {"target_modules": ["conv1d", "lin0"]}, "conv1d"),
    (
        "Trained tokens",
        "EmbConv1D",
        {"target_modules": ["conv1d"], "trainable_token_indices": {"emb": [0, 10]}},
        "conv1d",
    ),
    ("Conv1d", "Conv1d", {"target_modules": ["conv1d"]}, "convolutions"),
    ("Conv2d and a linear layer", "Conv2d", {"target_modules": ["conv2d", "lin0"]}, "convolutions"),
    ("Conv2d of one tap", "Conv2d1x1", {"target_modules": ["conv2d"]}, "convolutions"),
    ("Conv2d of groups", "Conv2dGroups", {"target_modules": ["conv2d"]}, "groups"),
    ("Conv3d", "Conv3d", {"target_modules": ["conv3d"]}, "convolutions"),
)


def selected_methods() -> tuple[Method, ...]:
    """The methods named in the environment (comma separated), or all that are not baselines.

    Raises:
        ValueError: for a name that no method has.
    """
    names = [name for name in os.environ.get(METHODS_VARIABLE, "").split(",") if name]
    if not names:
        return tuple(method for method in METHODS if not method.baseline)
    known = {method.name: method for method in METHODS}
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ValueError(f"{METHODS_VARIABLE} names {unknown}; known methods: {sorted(known)}")
    return tuple(known[name] for name in names)


def config_classes(methods: tuple[Method, ...]) -> list[type]:
    return [method.config_cls for method in methods]


def custom_rows(methods: tuple[Method, ...]) -> list[tuple]:
    """Rows of ``TEST_CASES``: (test name, model, config class, keyword arguments)."""
    return [
        (f"{method.name}: {name}", model, method.config_cls, {**method.kwargs, **layout})
        for method in methods
        for name, model, layout, needs in CUSTOM_LAYOUTS
        if (needs is None or getattr(method, needs)) and _accepts(method.config_cls, layout)
    ]


def multiple_adapter_rows(methods: tuple[Method, ...]) -> list[tuple]:
    """Rows of ``MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES``: (test name, tuner, config class, 1st and 2nd arguments)."""
    rows = []
    for method in methods:
        first = {**method.kwargs, "target_modules": ["lin0"], "init_weights": False}
        seconds = {
            "same layer": first,
            "same layer, other budget": {**first, **method.other},
            "other layer": {**first, "target_modules": ["lin1"]},
            "overlapping layers": {**first, "target_modules": ["lin0", "lin1"]},
        }
        for name, second in seconds.items():
            rows.append((f"{method.name}: {name}", method.name, method.config_cls, first, second))
    return rows


def mixed_batch_rows(methods: tuple[Method, ...], first: dict[str, Any], second: dict[str, Any]) -> list[tuple]:
    """Rows of the mixed-batch tests: (test name, config, config), the targets given by ``first`` and ``second``."""
    return [
        (
            f"{method.name}: mixed batch",
            method.config_cls(**method.kwargs, **first, init_weights=False),
            method.config_cls(**{**method.kwargs, **method.other}, **second, init_weights=False),
        )
        for method in methods
        if method.mixed_batches
    ]


def mandatory_rows(methods: tuple[Method, ...]) -> list[tuple]:
    """Rows of ``ALL_CONFIG_CLASSES``: none of our configs has a mandatory argument."""
    return [(method.config_cls, {}) for method in methods]


def layer_indexing_rows(methods: tuple[Method, ...]) -> list[tuple]:
    wanted = {"layers_to_transform": 0, "layers_pattern": "layers"}
    return [row for row in mandatory_rows(methods) if _accepts(row[0], wanted)]


def transformers_rows(methods: tuple[Method, ...], task_type: str) -> list[tuple]:
    """Rows of ``ALL_CONFIGS``: (config class, keyword arguments), targets by the model type's default and by wildcard.

    The wildcard is left out for feature extraction: it would reach the pooler, which has no part in the output that
    upstream's tests train on.
    """
    targets = [None] if task_type == "FEATURE_EXTRACTION" else [None, "all-linear"]
    return [
        (method.config_cls, {**method.kwargs, "task_type": task_type, "target_modules": target})
        for method in methods
        for target in targets
    ]


def _accepts(config_cls: type, arguments: dict[str, Any]) -> bool:
    return set(arguments) <= {field.name for field in dataclasses.fields(config_cls)}
