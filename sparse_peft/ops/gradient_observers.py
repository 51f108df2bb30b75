"""Looking at a weight's gradient in the moment the backward pass has what it is made from.

A layer has a number, its *key*; whoever wants to see the layer's gradients leaves an observer under it. Numbers and
not objects, so that a compiled graph, traced once, finds the observers of each later step.
"""

from __future__ import annotations

import itertools
from typing import Protocol

from torch import Tensor

from ..support import Support

_keys = itertools.count(1)
_observers: dict[int, GradientObserver] = {}

UNOBSERVED = 0


class GradientObserver(Protocol):
    def support_grad(self, left: Tensor, right: Tensor, support: Support) -> Tensor:
        """What ``support_grad`` returns for these arguments, having seen what it wants to."""
        ...


def new_key() -> int:
    """A key that no other layer of this process has."""
    return next(_keys)


def observe(key: int, observer: GradientObserver | None) -> None:
    """Leave an observer under a layer's key, or take it away."""
    if observer is None:
        _observers.pop(key, None)
    else:
        _observers[key] = observer


def observer_of(key: int) -> GradientObserver | None:
    return _observers.get(key)
