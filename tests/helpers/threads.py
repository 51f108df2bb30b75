"""Several threads at once, which change places after every few instructions."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def quick_switches() -> Iterator[None]:
    """Inside the block Python changes threads as often as it can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def together(*acts: Callable[[], Any], seconds: float = 60) -> list[Any]:
    """What the actions return, each run in a thread of its own; their first exception, if any raises one."""
    results: list[Any] = [None] * len(acts)
    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            results[number] = acts[number]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(n,), daemon=True) for n in range(len(acts))]
    with quick_switches():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(seconds)
    assert not any(thread.is_alive() for thread in threads), "the threads wait for each other"
    if errors:
        raise errors[0]
    return results
