"""Rows in place of upstream's case lists: every method's case, in every layout."""

from __future__ import annotations

import dataclasses
import os
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .case import Case

METHODS_VARIABLE = "SPARSE_PEFT_SUITE_METHODS"

SHIRA = Case(
    "shira",
    "peft:ShiraConfig",
    {"r": 1},
    {"r": 1},
    conv1d=False,
    convolutions=False,
    groups=False,
    mixed_batches=False,
    baseline=True,
)


def found_cases() -> Iterator[Case]:
    """The cases of all methods, from each ``peft_case.py`` under ``tests/``; no method is imported."""
    for path in sorted(Path(__file__).parents[1].rglob("peft_case.py")):
        yield runpy.run_path(str(path))["CASE"]


CASES = (*found_cases(), SHIRA)

# (name, upstream's model, keyword arguments, what it needs of a method besides linear layers)
CUSTOM_LAYOUTS = (
    ("MLP, one layer by name", "MLP", {"target_modules": "lin0"}, None),
    ("MLP, the small layer", "MLP", {"target_modules": ["lin1"]}, None),
    ("MLP, two layers", "MLP", {"target_modules": ["lin0", "lin1"]}, None),
    ("MLP, modules_to_save", "MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}, None),
    ("Embedding and Conv1D", "EmbConv1D", {"target_modules": ["conv1d", "lin0"]}, "conv1d"),
    ("Embedding alone", "EmbConv1D", {"target_modules": ["emb"]}, "embeddings"),
    ("Embedding as a target and Conv1D", "EmbConv1D", {"target_modules": ["emb", "conv1d", "lin0"]}, "embeddings"),
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


def selected_methods() -> tuple[Case, ...]:
    """The methods named in the environment (comma separated), or all that are not baselines.

    Raises:
        ValueError: for a name that no method has.
    """
    names = [name for name in os.environ.get(METHODS_VARIABLE, "").split(",") if name]
    if not names:
        return tuple(case for case in CASES if not case.baseline)
    known = {case.name: case for case in CASES}
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ValueError(f"{METHODS_VARIABLE} names {unknown}; known methods: {sorted(known)}")
    return tuple(known[name] for name in names)


def config_classes(methods: tuple[Case, ...]) -> list[type]:
    return [method.config_cls for method in methods]


def custom_rows(methods: tuple[Case, ...]) -> list[tuple]:
    """Rows of ``TEST_CASES``: (test name, model, config class, keyword arguments)."""
    return [
        (f"{method.name}: {name}", model, method.config_cls, {**method.kwargs, **layout})
        for method in methods
        for name, model, layout, needs in CUSTOM_LAYOUTS
        if (needs is None or getattr(method, needs)) and _accepts(method.config_cls, layout)
    ]


def multiple_adapter_rows(methods: tuple[Case, ...]) -> list[tuple]:
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


def mixed_batch_rows(methods: tuple[Case, ...], first: dict[str, Any], second: dict[str, Any]) -> list[tuple]:
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


def mandatory_rows(methods: tuple[Case, ...]) -> list[tuple]:
    """Rows of ``ALL_CONFIG_CLASSES``: none of our configs has a mandatory argument."""
    return [(method.config_cls, {}) for method in methods]


def layer_indexing_rows(methods: tuple[Case, ...]) -> list[tuple]:
    wanted = {"layers_to_transform": 0, "layers_pattern": "layers"}
    return [row for row in mandatory_rows(methods) if _accepts(row[0], wanted)]


def transformers_rows(methods: tuple[Case, ...], task_type: str) -> list[tuple]:
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
