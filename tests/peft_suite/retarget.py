"""Points upstream's parametrised tests at other cases, without changing a line of them.

``pytest.mark.parametrize`` leaves a mark on the function that holds the list of cases. Replacing that mark after the
module is imported and before its tests are collected makes pytest generate the same tests for our cases.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType

import pytest


def replace_list(module: ModuleType, name: str, rows: Sequence) -> None:
    """Replaces the module's list ``name`` by ``rows``, in the module and in every test that is parametrised by it.

    Raises:
        pytest.UsageError: the module has no such list, or no test uses it.
    """
    old = getattr(module, name, None)
    if old is None:
        raise pytest.UsageError(f"{module.__name__} has no {name}: this version of PEFT is laid out differently")
    setattr(module, name, list(rows))
    _replace(module, name, lambda test, values: values is old, rows)


def replace_inline(module: ModuleType, test_name: str, arguments: str, rows: Sequence) -> None:
    """Replaces the cases written in the decorator of ``test_name`` for its ``arguments`` ("config_cls").

    Raises:
        pytest.UsageError: there is no such test, or it has no such arguments.
    """

    def wanted(test: Callable, values: object) -> bool:
        return test.__name__ == test_name and any(
            mark.args[0] == arguments and mark.args[1] is values for mark in test.pytestmark
        )

    _replace(module, f"{test_name}({arguments})", wanted, rows)


def _replace(module: ModuleType, what: str, wanted: Callable[[Callable, object], bool], rows: Sequence) -> None:
    found = 0
    for test in _parametrised_tests(module):
        marks = []
        for mark in test.pytestmark:
            if mark.name == "parametrize" and wanted(test, mark.args[1]):
                mark = pytest.mark.parametrize(mark.args[0], list(rows), **mark.kwargs).mark
                found += 1
            marks.append(mark)
        test.pytestmark = marks
    if not found:
        raise pytest.UsageError(
            f"no test of {module.__name__} uses {what}: this version of PEFT is laid out differently"
        )


def _parametrised_tests(module: ModuleType) -> Iterator[Callable]:
    for holder in [module, *(cls for _, cls in inspect.getmembers(module, inspect.isclass))]:
        if inspect.isclass(holder) and holder.__module__ != module.__name__:
            continue
        for member in vars(holder).values():
            if inspect.isfunction(member) and any(
                mark.name == "parametrize" for mark in getattr(member, "pytestmark", [])
            ):
                yield member
