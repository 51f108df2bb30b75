"""Drives the scripts of PEFT's comparison with this package's methods.

PEFT's folder is used as it is: its `run.py` runs in this process, and three functions of its `utils.py` are replaced
in memory. Nothing is written into its files.
"""

from __future__ import annotations

import importlib
import os
import runpy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

from peft import PeftConfig, PeftModel
from torch import nn

import sparse_peft
from sparse_peft.tuners.traversal import configs_of

# Results of these runs are no results of PEFT's main branch: its scripts file them under this branch.
BRANCH = "sparse-peft"
# Training batches that choose positions, for criteria that need data.
CALIBRATION_BATCHES = 16
# The modules that PEFT's run.py imports by these names from its own folder.
MODULES = ("data", "utils")


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """PEFT's own modules of a comparison are found first; those that were imported before come back afterwards."""
    before = {name: sys.modules.pop(name, None) for name in MODULES}
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


@contextmanager
def started_from(folder: Path, *arguments: str) -> Iterator[None]:
    """The working directory and the command line of a script."""
    directory, command = Path.cwd(), sys.argv
    os.chdir(folder)
    sys.argv = ["run.py", *arguments]
    try:
        yield
    finally:
        os.chdir(directory)
        sys.argv = command


class Driver:
    """The replaced functions of one run.

    Args:
        utils, data: PEFT's modules of the comparison.
    """

    def __init__(self, utils: ModuleType, data: ModuleType) -> None:
        self.utils, self.data = utils, data
        self.tokenizer: Any = None
        self.settings: Any = None

    def install(self) -> None:
        """Replace the functions, before `run.py` imports them."""
        utils = self.utils
        utils.get_optimizer_and_scheduler = self.with_controller(utils.get_optimizer_and_scheduler)
        utils.get_peft_model = self.with_chosen_positions(utils.get_peft_model)
        utils.get_train_config = self.noted("settings", utils.get_train_config)
        if hasattr(utils, "get_tokenizer"):
            utils.get_tokenizer = self.noted("tokenizer", utils.get_tokenizer)
        utils.get_peft_branch = lambda: BRANCH

    def noted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose result is kept under a name."""

        def call(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            setattr(self, name, result)
            return result

        return call

    def with_controller(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def get_optimizer_and_scheduler(model: nn.Module, *, max_steps: int, **options: Any) -> Any:
            if any(getattr(config, "changes_in_training", False) for config in configs_of(model).values()):
                sparse_peft.attach(model, total_steps=max_steps)
            return function(model, max_steps=max_steps, **options)

        return get_optimizer_and_scheduler

    def with_chosen_positions(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def get_peft_model(model: nn.Module, config: PeftConfig, **options: Any) -> PeftModel:
            if getattr(config, "selection_needs", "none") in ("gradient", "activation"):
                config = sparse_peft.select_support(model.eval(), config, self.batches(model))
            return function(model, config, **options)

        return get_peft_model

    def batches(self, model: nn.Module) -> Iterator[dict[str, Any]]:
        """The first training batches, with labels but at padding.

        Raises:
            NotImplementedError: the task has no tokenizer, so that its batches are no text.
        """
        if self.tokenizer is None:
            raise NotImplementedError(
                "selections that need data are driven on MetaMathQA only; choose one that needs none"
            )
        rows = self.data.get_train_valid_test_datasets(
            tokenizer=self.tokenizer, query_template=self.settings.query_template, print_fn=lambda *_: None
        )[0]
        size = self.settings.batch_size
        for start in islice(range(0, len(rows), size), CALIBRATION_BATCHES):
            part = {name: rows[start : start + size][name] for name in ("input_ids", "attention_mask")}
            batch = self.tokenizer.pad(part, return_tensors="pt").to(model.device)
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            yield {**batch, "labels": labels}


def run_experiment(
    peft_folder: Path,
    experiment: Path,
    *,
    results: Path | None = None,
    options: tuple[str, ...] = (),
    prepare: Callable[[ModuleType, ModuleType], None] = lambda utils, data: None,
) -> None:
    """Run one experiment with PEFT's `run.py`.

    Args:
        peft_folder: a task's folder in PEFT's repository, such as `method_comparison/MetaMathQA`.
        experiment: `.../experiments/<method>/<name>`.
        results: folder of the result files; by default PEFT's `temporary_results`.
        options: further arguments of `run.py`.
        prepare: changes PEFT's modules before the run.

    Raises:
        FileNotFoundError: one of the folders is none.
    """
    peft_folder, experiment = peft_folder.resolve(), experiment.resolve()
    if not (peft_folder / "run.py").is_file():
        raise FileNotFoundError(f"{peft_folder} has no run.py: pass a task's folder in PEFT's method_comparison")
    if not experiment.is_dir() or experiment.parent.parent.name != "experiments":
        raise FileNotFoundError(f"{experiment}: a folder .../experiments/<method>/<name> is expected")
    with importable(peft_folder):
        utils, data = importlib.import_module("utils"), importlib.import_module("data")
        _write_results(utils, results)
        prepare(utils, data)
        Driver(utils, data).install()
        root = experiment.parents[2]
        with started_from(root, *options, str(experiment.relative_to(root))):
            runpy.run_path(str(peft_folder / "run.py"), run_name="__main__")


def _write_results(utils: ModuleType, folder: Path | None) -> None:
    """Make the folders of results; with ``folder``, all of them are this one."""
    for name in ("RESULT_PATH_TEST", "RESULT_PATH_CANCELLED"):
        target = Path(getattr(utils, name)) if folder is None else folder.resolve()
        setattr(utils, name, str(target))
        target.mkdir(parents=True, exist_ok=True)
