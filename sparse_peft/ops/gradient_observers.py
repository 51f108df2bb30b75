"""Observers called with the factors of a weight gradient during backward.

Each layer has a number, its *key*, under which an observer is registered. Keys are numbers and no objects, so that a
compiled graph, traced once, finds the observers of later steps.
"""

from __future__ import annotations

import itertools
from typing import Protocol

from torch import Tensor

from ..support import Support
from .one_hot import Factor

_keys = itertools.count(1)
_observers: dict[int, GradientObserver] = {}

UNOBSERVED = 0


class GradientObserver(Protocol):
    """Takes the place of ``support_grad`` for one layer."""

    def support_grad(self, left: Factor, right: Tensor, support: Support) -> Tensor:
        """The same result as ``sparse_peft.ops.support_grad`` for these arguments."""
        ...


def new_key(count: int = 1) -> int:
    """The first of ``count`` keys, one after the other, that are unique in this process."""
    first = next(_keys)
    for _ in range(1, count):
        next(_keys)
    return first


def observe(key: int, observer: GradientObserver | None) -> None:
    """Register an observer under a layer's key; None removes it."""
    if observer is None:
        _observers.pop(key, None)
    else:
        _observers[key] = observer


def observer_of(key: int) -> GradientObserver | None:
    """The observer under a layer's key."""
    return _observers.get(key)


def any_observed(first: int, count: int) -> bool:
    """Whether there is an observer under one of ``count`` keys, one after the other."""
    return bool(_observers) and any(first + number in _observers for number in range(count))
