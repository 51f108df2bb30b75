"""The examples in docstrings run."""

import doctest
import importlib
import pkgutil

import pytest

import sparse_peft

# The other packages' examples load models.
PACKAGES = ("calibrate", "numerics", "ops", "support")


def modules():
    for package in PACKAGES:
        folder = importlib.import_module(f"sparse_peft.{package}")
        yield from (module.name for module in pkgutil.iter_modules(folder.__path__, f"{folder.__name__}."))


def examples_of(name):
    finder = doctest.DocTestFinder(exclude_empty=True)
    return [test for test in finder.find(importlib.import_module(name)) if test.examples]


@pytest.mark.parametrize("name", list(modules()))
def test_examples_run(name):
    for test in examples_of(name):
        failed, _ = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test)
        assert failed == 0, test.name


def test_there_are_examples():
    names = {test.name.rsplit(".", 1)[-1] for name in modules() for test in examples_of(name)}
    assert {"Support", "Budget", "select", "topk_outer", "collect_supports", "use_backend"} <= names
    assert sparse_peft.panel_limit.__doc__ and ">>>" in sparse_peft.panel_limit.__doc__
