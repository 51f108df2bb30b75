"""Registers the sparse methods with PEFT once an adapter of theirs is loaded, without ``import sparse_peft``.

``sparse_peft.pth`` imports this module when the interpreter starts. Nothing else is imported then: a finder waits for
PEFT. ``SPARSE_PEFT_AUTOLOAD=0`` switches it off. Errors are logged, and PEFT then behaves as without this module.
"""

import _thread
import os
import sys

TYPE_CHECKING = False  # that of typing, which takes longer to import than the rest
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType
    from typing import Any

SWITCH = "SPARSE_PEFT_AUTOLOAD"
PACKAGE = "sparse_peft"
PREFIX = "SPARSE_PEFT_"  # of the names of all PEFT types of the package


class Registered(BaseException):
    """The package has just been imported: a load that had begun without its checks begins anew.

    No ``Exception``, so that no handler on its way stops it.
    """


def install() -> None:
    """Wait for PEFT; a second time changes nothing."""
    if os.environ.get(SWITCH, "").lower() in ("0", "false", "no", "off") or PACKAGE in sys.modules:
        return
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder())


class Finder:
    """Changes the modules of ``CHANGES`` right after they have run."""

    def find_spec(self, name: str, path: "Any" = None, target: "Any" = None) -> "Any":
        if name not in CHANGES or PACKAGE in sys.modules:
            return None
        try:
            return _changed_spec(name, path, target, self)
        except Exception:
            _log(f"{name} is imported as it is, without a search for sparse methods")
            return None


def _changed_spec(name: str, path: "Any", target: "Any", own: Finder) -> "Any":
    """The spec that the other finders find, with a loader that changes the module."""
    for finder in sys.meta_path:
        find = None if finder is own else getattr(finder, "find_spec", None)
        spec = find(name, path, target) if find is not None else None
        if spec is not None:
            _let_change(spec.loader)
            return spec
    return None


def _let_change(loader: "Any") -> None:
    # an attribute of this one loader, which is gone when the module runs
    loader.exec_module = lambda module: _run_and_change(loader, module)


def _run_and_change(loader: "Any", module: "ModuleType") -> None:
    del loader.exec_module
    loader.exec_module(module)
    try:
        CHANGES[module.__name__](module)
    except Exception:
        _log(f"{module.__name__} stays as it is, without a search for sparse methods")


# ------------------------------------------------------------------ PEFT's tables


class Configs(dict):
    """PEFT's table of configs by type, which has those of this package from the first question on."""

    def __missing__(self, key: object) -> "Any":
        if _import_for(key) and dict.__contains__(self, key):
            _begin_anew()
            return self[key]
        raise KeyError(key)

    def __contains__(self, key: object) -> bool:
        return dict.__contains__(self, key) or (_import_for(key) and dict.__contains__(self, key))

    def get(self, key: object, default: "Any" = None) -> "Any":
        return dict.get(self, key, default) if key in self else default


def _change_mapping(module: "Any") -> None:
    module.PEFT_TYPE_TO_CONFIG_MAPPING = Configs(module.PEFT_TYPE_TO_CONFIG_MAPPING)
    module.PeftType._missing_ = classmethod(_missing_type)


def _missing_type(kind: "Any", value: object) -> "Any":
    _import_for(value)
    return kind._value2member_map_.get(value)


def _import_for(key: object) -> bool:
    """Import the package for a type of its own; returns whether it is there. Another thread's import is waited for."""
    if not isinstance(key, str) or not key.startswith(PREFIX):
        return False
    try:
        __import__(PACKAGE)
    except Exception:
        _log(f"{PACKAGE} cannot be imported, which the adapter needs")
        return False
    return True


# ------------------------------------------------------------------ loads that have begun

_loads: "list[int]" = []  # threads with a load that can begin anew


def _begin_anew() -> None:
    if _thread.get_ident() in _loads:
        raise Registered


def _change_peft_model(module: "Any") -> None:
    _let_begin_anew(module.PeftModel, "from_pretrained")
    _let_begin_anew(module.PeftModel, "load_adapter")


def _change_transformers(module: "Any") -> None:
    _let_begin_anew(module.PeftAdapterMixin, "load_adapter")


def _let_begin_anew(owner: type, name: str) -> None:
    """Let a method begin anew if the package is imported inside, which puts its checks around the method."""
    import functools  # noqa: PLC0415  (not needed when the interpreter starts)

    found = owner.__dict__[name]
    original = getattr(found, "__func__", found)

    @functools.wraps(original)
    def load(self: "Any", *args: "Any", **kwargs: "Any") -> "Any":
        thread = _thread.get_ident()
        _loads.append(thread)
        try:
            return original(self, *args, **kwargs)
        except Registered:
            pass
        finally:
            _loads.remove(thread)
        return getattr(self, name)(*args, **kwargs)

    setattr(owner, name, classmethod(load) if isinstance(found, classmethod) else load)


CHANGES: "dict[str, Callable[[ModuleType], None]]" = {
    "peft.mapping": _change_mapping,
    "peft.peft_model": _change_peft_model,
    "transformers.integrations.peft": _change_transformers,
}


def _log(what: str) -> None:
    import logging  # noqa: PLC0415  (not needed when the interpreter starts)

    logging.getLogger(PACKAGE).warning("%s; %s=0 switches it off", what, SWITCH, exc_info=True)


install()
