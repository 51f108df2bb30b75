"""One transition at a time: the lock under which base weights and adapters' flags change.

A *transition* changes what a base weight holds or which adapters act on it. Transitions of all models take one lock,
so that no order of locks can be wrong. Passes through layers that are as they should be take none.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator, Set
from contextlib import suppress
from threading import get_ident
from types import CodeType, FrameType
from typing import Concatenate, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
Self = TypeVar("Self")

_lock = threading.RLock()
# {thread: its call} of those that wait for the lock. Nobody waits for these to leave a layer: two threads would wait
# for each other.
_waiting: dict[int, FrameType] = {}


class _Thread(threading.local):
    is_inside = False


_thread = _Thread()


def exclusively(act: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run ``act`` while no other thread is in a transition.

    The lock is free again after an exception at any line. An interrupt may come between a block's end and the lock's
    release, so ``with`` is not enough.
    """
    if _thread.is_inside:
        return act(*args, **kwargs)
    me = get_ident()
    try:
        if not _lock.acquire(blocking=False):
            _waiting[me] = sys._getframe()
            _lock.acquire()
            _waiting.pop(me, None)
        _thread.is_inside = True
        result = act(*args, **kwargs)
        _thread.is_inside = False
        _lock.release()
        return result
    except BaseException:
        _waiting.pop(me, None)
        _thread.is_inside = False
        with suppress(RuntimeError):  # it was released, which is the rule
            _lock.release()
        raise


def calls_of(thread: int) -> Iterator[FrameType]:
    """The Python calls that a thread is in, the innermost first."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        yield frame
        frame = frame.f_back


def is_within(thread: int, codes: Set[CodeType]) -> bool:
    """Whether a thread runs one of these functions, and does not wait for the lock in it."""
    calls, waits = list(calls_of(thread)), _waiting.get(thread)
    return waits not in calls and any(call.f_code in codes for call in calls)


def exclusive(method: Callable[Concatenate[Self, P], T]) -> Callable[Concatenate[Self, P], T]:
    """A method that runs ``exclusively``."""

    @functools.wraps(method)
    def locked(self: Self, *args: P.args, **kwargs: P.kwargs) -> T:
        return exclusively(method, self, *args, **kwargs)

    return locked


def _forget_other_threads() -> None:
    """A forked process has one thread; whatever others held is free."""
    global _lock
    _lock = threading.RLock()
    _thread.is_inside = False
    _waiting.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_other_threads)
