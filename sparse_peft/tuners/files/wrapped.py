"""Functions of PEFT and transformers that this package wraps, where they offer no hook."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

WRAPPERS = "_sparse_peft_wrappers"  # attribute of a wrapped function: names of its wrappers


def wrap_once(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Wrap a function or class method of a module or class; a second call with the same wrapper changes nothing.

    Without the function, in another version of the library, nothing is wrapped and a warning names it.

    Args:
        owner: the module or class.
        name: attribute of ``owner``.
        wrapper: called with the original function, followed by the arguments of the call.

    Example:
        >>> class Greeter:
        ...     def greet(self, name):
        ...         return f"hello {name}"
        >>> def in_capitals(original, *args, **kwargs):
        ...     return original(*args, **kwargs).upper()
        >>> wrap_once(Greeter, "greet", in_capitals)
        >>> wrap_once(Greeter, "greet", in_capitals)
        >>> Greeter().greet("you")
        'HELLO YOU'
    """
    found = inspect.getattr_static(owner, name, None)
    original = found.__func__ if isinstance(found, classmethod) else found
    if not callable(original):
        _warn_of_missing(owner, name, wrapper)
        return
    this = f"{wrapper.__module__}.{wrapper.__qualname__}"
    present: frozenset[str] = getattr(original, WRAPPERS, frozenset())
    if this in present:
        return

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    setattr(wrapped, WRAPPERS, present | {this})
    setattr(owner, name, classmethod(wrapped) if isinstance(found, classmethod) else wrapped)


def _warn_of_missing(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    where = f"{owner.__module__}.{owner.__qualname__}" if inspect.isclass(owner) else owner.__name__
    library, effect = where.partition(".")[0], (wrapper.__doc__ or wrapper.__name__).partition("\n")[0].rstrip(".")
    warnings.warn(
        f"{where}.{name} is missing in the installed {library}, so sparse_peft does not do this: {effect}; install a "
        f"version of {library} that sparse_peft supports",
        stacklevel=3,
    )
