"""Class docstrings of every method: a link to its paper, and an example that runs."""

import doctest
import inspect
import re

import pytest
import torch

from sparse_peft.registry import methods

CLASSES = [
    kind
    for method in methods()
    if method.model_class.__module__.startswith("sparse_peft.")
    for kind in (method.config_class, method.model_class, method.model_class.layer_cls)
]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_classes_link_their_paper_and_show_how_they_are_used(kind):
    text = inspect.getdoc(kind)
    assert re.search(r"https://arxiv\.org/abs/\d{4}\.\d{5}", text)
    torch.manual_seed(0)
    (test,) = doctest.DocTestFinder(recurse=False).find(kind, kind.__name__)
    failed, tried = doctest.DocTestRunner().run(test)
    assert tried and not failed
