"""The examples in docstrings run, and every top-level object has one."""

import doctest
import importlib
import inspect
import pkgutil

import pytest
import torch

import sparse_peft
from sparse_peft import adapters, planning, procedures, sync

PACKAGES = ("calibrate", "numerics", "ops", "sparsify", "support")
# Those of methods: tests/tuners/test_docstrings.py.
METHODS_CLASSES = ("Config", "Model", "Linear")
PUBLIC = {
    name: getattr(package, name)
    for package in (sparse_peft, adapters, planning, procedures)
    for name in package.__all__
    if callable(getattr(package, name)) and not name.endswith(METHODS_CLASSES)
}
# Others of sync need an engine or a second process.
OF_SYNC = ("WeightPatch", "apply_patches_", "checkpoint_shapes", "fingerprint", "from_bytes", "to_bytes")


def modules():
    for package in PACKAGES:
        folder = importlib.import_module(f"sparse_peft.{package}")
        yield from (module.name for module in pkgutil.iter_modules(folder.__path__, f"{folder.__name__}."))


def examples_of(name):
    finder = doctest.DocTestFinder(exclude_empty=True)
    return [test for test in finder.find(importlib.import_module(name)) if test.examples]


def run(test):
    failed, _ = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test)
    assert failed == 0, test.name


@pytest.mark.parametrize("name", list(modules()))
def test_examples_run(name):
    for test in examples_of(name):
        run(test)


@pytest.mark.parametrize("name", PUBLIC)
def test_examples_of_public_objects_run(name):
    torch.manual_seed(0)
    for test in doctest.DocTestFinder(recurse=False).find(PUBLIC[name], name):
        run(test)


@pytest.mark.parametrize("name", OF_SYNC)
def test_examples_of_sync_run(name):
    (test,) = doctest.DocTestFinder(recurse=False).find(getattr(sync, name), name)
    assert test.examples
    run(test)


@pytest.mark.parametrize("name", [name for name in sparse_peft.__all__ if name in PUBLIC])
def test_top_level_objects_have_an_example(name):
    assert ">>>" in inspect.getdoc(PUBLIC[name])


def test_there_are_examples():
    names = {test.name.rsplit(".", 1)[-1] for name in modules() for test in examples_of(name)}
    assert {"Support", "Budget", "select", "topk_outer", "collect_supports", "use_backend"} <= names
    assert sparse_peft.panel_limit.__doc__ and ">>>" in sparse_peft.panel_limit.__doc__
