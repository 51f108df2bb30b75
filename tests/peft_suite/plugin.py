"""The pytest plugin that turns upstream's test files on our methods (``-p tests.peft_suite.plugin``)."""

from __future__ import annotations

import importlib
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch

from . import cases, models
from .case import Case
from .known_issues import KNOWN_ISSUES
from .mutants import MUTANT_VARIABLE, apply_mutant
from .retarget import replace_inline, replace_list
from .runner import FILE_VARIABLE, REPORT_VARIABLE
from .upstream import PACKAGE, TEST_FILES

_TASKS = {
    "decoder": ("PEFT_DECODER_MODELS_TO_TEST", "CAUSAL_LM"),
    "encdec": ("PEFT_ENCODER_DECODER_MODELS_TO_TEST", "SEQ_2_SEQ_LM"),
    "feature": ("PEFT_FEATURE_EXTRACTION_MODELS_TO_TEST", "FEATURE_EXTRACTION"),
    "seqcls": ("PEFT_SEQ_CLS_MODELS_TO_TEST", "SEQ_CLS"),
}
# Not parametrised, but about every config of the (replaced) enum.
_ABOUT_ALL_METHODS = {"test_from_peft_type"}
# Upstream skips these for all methods but LoRA, by comparing with the class of that name.
_LORA_ONLY_BY_NAME = {"test_mixed_adapter_batches", "test_generate_with_mixed_adapter_batches"}
# Upstream compares merged convolutions to 1e-6, LoRA's to 1e-3, told apart in the same way.
_LORA_TOLERANCE_BY_NAME = {"test_safe_merge"}


def pytest_configure(config: pytest.Config) -> None:
    file = os.environ[FILE_VARIABLE]
    pytest.register_assert_rewrite(PACKAGE)
    # What other packages say while they are imported would drown the result.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        common = importlib.import_module(f"{PACKAGE}.testing_common")
        module = importlib.import_module(f"{PACKAGE}.{TEST_FILES[file]}")
    methods = cases.selected_methods()
    classes = tuple(cases.config_classes(methods))
    if os.environ.get(MUTANT_VARIABLE):
        apply_mutant(os.environ[MUTANT_VARIABLE])

    if file == "custom":
        _retarget_custom(module, methods)
    elif file == "config":
        _retarget_config(module, methods)
    else:
        list_name, task_type = _TASKS[file]
        replace_list(module, list_name, models.BY_FILE[file])
        replace_list(module, "ALL_CONFIGS", cases.transformers_rows(methods, task_type))
        _keep_offline(models.BY_FILE[file])
    _undo_skips(common, module, methods)
    config.pluginmanager.register(_Suite(methods, classes, common), "sparse_peft_suite")


def _retarget_custom(module: ModuleType, methods: tuple[Case, ...]) -> None:
    lin0, lin1, both = ({"target_modules": names} for names in (["lin0"], ["lin1"], ["lin0", "lin1"]))
    saved = {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}
    classes = cases.config_classes(methods)

    replace_list(module, "TEST_CASES", cases.custom_rows(methods))
    replace_list(module, "ALL_PEFT_CONFIG_CLASSES", classes)
    replace_list(module, "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES", cases.multiple_adapter_rows(methods))
    for test in (
        "test_multiple_adapters_mixed_modules_to_save",
        "test_multiple_adapters_mixed_modules_to_save_order_switched",
    ):
        replace_inline(module, test, "config_cls", classes)

    replace_list(module, "MIXED_ADAPTER_TEST_CASES", cases.mixed_batch_rows(methods, lin0, lin0))
    for test, first, second in (
        ("test_mixed_adapter_batches_different_target_layers", lin0, lin1),
        ("test_mixed_adapter_batches_multiple_modules_to_save", saved, saved),
        ("test_mixed_adapter_batches_partly_overlapping_target_layers", lin0, both),
    ):
        replace_inline(module, test, "test_name, config0, config1", cases.mixed_batch_rows(methods, first, second))
    replace_inline(
        module,
        "test_mixed_adapter_batches_lora_wrong_adapter_name_raises",
        "test_name, config",
        [row[:2] for row in cases.mixed_batch_rows(methods, lin0, lin0)],
    )


def _retarget_config(module: ModuleType, methods: tuple[Case, ...]) -> None:
    # test_from_peft_type goes over this enum, and some of PEFT's own types need packages that may not be there.
    module.PeftType = [config_cls().peft_type for config_cls in cases.config_classes(methods)]
    replace_list(module, "ALL_CONFIG_CLASSES", cases.mandatory_rows(methods))
    replace_list(module, "LAYER_INDEXING_CONFIG_CLASSES", cases.layer_indexing_rows(methods))
    replace_inline(module, "test_save_pretrained_with_target_modules", "config_class", cases.config_classes(methods))


def _keep_offline(model_ids: list[str]) -> None:
    # Upstream's helper lifts HF_HUB_OFFLINE the first time that it sees a model.
    utils = importlib.import_module(f"{PACKAGE}.testing_utils")
    utils._HUB_MODEL_ACCESSES.update(dict.fromkeys(model_ids, 1))


def _undo_skips(common: ModuleType, module: ModuleType, methods: tuple[Case, ...]) -> None:
    """Upstream's helpers skip what they do not know, or know to be unsupported, by the name of the config class.

    GPT-2 is skipped for all classes but a few; here ``Case.conv1d`` decides. ``check_beft_config`` skips the merge
    tests of models without biases, which is meant for BEFT and hits all.
    """
    supporting = {method.config_cls for method in methods if method.conv1d}

    def skip_unless_supported(model_id: str, config_cls: type, config_kwargs: dict[str, Any] | None = None) -> None:
        if "gpt2" in model_id.lower() and config_cls not in supporting:
            pytest.skip(f"{config_cls.__name__} does not support Conv1D layers")

    for owner, name, replacement in (
        (common, "_skip_if_conv1d_not_supported", skip_unless_supported),
        (module, "_skip_if_not_conv1d_supported", skip_unless_supported),
        (module, "check_beft_config", lambda config_cls, model_id, config_kwargs: None),
    ):
        if hasattr(owner, name):
            setattr(owner, name, replacement)


def _parameters(item: pytest.Item) -> dict[str, Any]:
    return item.callspec.params if hasattr(item, "callspec") else {}


class _Suite:
    """Chooses the items, marks the known issues, and writes the counts down."""

    def __init__(self, methods: tuple[Case, ...], classes: tuple[type, ...], common: ModuleType):
        self.classes = classes
        self.common = common
        mixed = {method.config_cls for method in methods if method.mixed_batches}
        low_rank = {method.config_cls for method in methods if method.low_rank}
        self.as_lora = {
            **dict.fromkeys(_LORA_ONLY_BY_NAME, mixed),
            **dict.fromkeys(_LORA_TOLERANCE_BY_NAME, low_rank),
        }

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        ours = [item for item in items if self._is_ours(item)]
        kept = set(ours)
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = ours
        for item in items:
            for issue in KNOWN_ISSUES:
                if issue.covers(item.originalname, _parameters(item)):
                    item.add_marker(getattr(pytest.mark, issue.action)(reason=issue.reason))

    def _is_ours(self, item: pytest.Item) -> bool:
        return item.name in _ABOUT_ALL_METHODS or any(
            value in self.classes if isinstance(value, type) else isinstance(value, self.classes)
            for value in _parameters(item).values()
        )

    def pytest_runtest_setup(self) -> None:
        # Some upstream tests draw weights without a seed and compare to 1e-5: one in twenty draws fails, LoRA's too.
        torch.manual_seed(0)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Function) -> Iterator[None]:
        config_cls = _parameters(item).get("config_cls")
        if config_cls not in self.as_lora.get(item.originalname, ()):
            return (yield)
        with (
            mock.patch.multiple(self.common, LoraConfig=config_cls),
            mock.patch.multiple(item.module, LoraConfig=config_cls),
        ):
            return (yield)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        path = os.environ.get(REPORT_VARIABLE)
        if path is None:
            return
        stats = terminalreporter.stats
        counts = {name: len(stats.get(name, [])) for name in ("passed", "skipped", "xfailed", "xpassed")}
        failures = [report.nodeid for report in [*stats.get("failed", []), *stats.get("error", [])]]
        skips = sorted({(report.nodeid, str(report.longrepr[2])) for report in stats.get("skipped", [])})
        Path(path).write_text(json.dumps({**counts, "failures": failures, "skips": skips}), encoding="utf-8")
