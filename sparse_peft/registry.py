"""The registry of sparse methods: found by their folders, known to PEFT once registered."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils import PeftType, register_peft_method

from _sparse_peft_startup.spelling import did_you_mean

from .other_names import other_name
from .tuners.method import Method

# {PEFT type: method}; kept when this module is reloaded, as methods of other packages register once only
_methods: dict[str, Method] = globals().get("_methods", {})


def methods() -> tuple[Method, ...]:
    """The registered methods."""
    return tuple(_methods.values())


def method_of(config: PeftConfig) -> Method:
    """The method of a config.

    Raises:
        ValueError: the config is of another package's method.
    """
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind not in _methods:
        raise ValueError(f"peft_type={kind!r}: the sparse methods are {', '.join(_methods)}")
    return _methods[kind]


def method_named(name: str) -> Method:
    """The method of a name: its folder's, its PEFT type's or its config's.

    Raises:
        ValueError: there is none; the closest one is named.
    """
    wanted = name.lower()
    for method in methods():
        if wanted in (method.name, method.peft_type.lower(), method.config_class.__name__.lower()):
            return method
    known = [method.name for method in methods()]
    other = other_name(name)
    hint = did_you_mean([wanted], known) if other is None else f"; use {other}"
    raise ValueError(f"method={name!r}: no such method{hint}; the methods are {', '.join(known)}")


# ------------------------------------------------------------------ registration


def register_method(method: Method) -> None:
    """Make a method known to PEFT, to the controller and to the command line; a second time changes nothing.

    The package's own methods are registered on import. A method in a package of its own calls this in its
    ``__init__``; its users import it beside sparse_peft.

    Args:
        method: its classes; see ``Method``.

    Raises:
        RuntimeError: another method of PEFT's or of a plugin's has its type, its name or its prefix.

    Example:
        >>> from sparse_peft import Method, register_method
        >>> from sparse_peft.tuners.sora import SoRAModel
        >>> from sparse_peft.tuners.sora.dynamics import SoRADynamics
        >>> register_method(Method("sora", SoRAModel, SoRADynamics))  # the package's own: nothing changes
    """
    peft_type = extend_peft_type(method.peft_type)
    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type)
    if registered is None:
        _check_free(method)
        register_peft_method(
            name=method.peft_type.lower(),
            config_cls=method.config_class,
            model_cls=method.model_class,
            prefix=method.prefix,
        )
    elif _path(registered) != _path(method.config_class):
        raise RuntimeError(
            f"PEFT type {method.peft_type!r} is already registered by {_path(registered)}; "
            f"{_path(method.config_class)} cannot be used beside it. Please report this to the package of the latter "
            "with the output of `pip list`."
        )
    if _methods.get(method.peft_type) != method:
        _methods[method.peft_type] = method


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _check_free(method: Method) -> None:
    same_name = [other.peft_type for other in methods() if other.name == method.name]
    if same_name:
        raise RuntimeError(f"method {method.name!r} of {method.peft_type}: {same_name[0]} has this name already")
    # register_peft_method compares the prefix with the mapping's keys, not its values, and so never sees a clash
    clash = [other for other, prefix in PEFT_TYPE_TO_PREFIX_MAPPING.items() if prefix == method.prefix]
    if clash:
        raise RuntimeError(
            f"the parameter prefix {method.prefix!r} of {method.peft_type} is already used by PEFT type {clash[0]!s}"
        )


def extend_peft_type(value: str) -> PeftType:
    """Add ``value`` to PEFT's enum in place and return the member; a member that exists is returned as it is.

    PEFT, transformers and diffusers read ``.value`` and compare identities, so a plain string is not enough.
    """
    if value in PeftType.__members__:
        return PeftType[value]
    kind: Any = PeftType  # whose private parts are unknown to type checkers
    member = str.__new__(kind, value)
    member._name_ = member._value_ = value
    member.__objclass__ = kind
    member._sort_order_ = len(kind._member_names_)
    kind._member_names_.append(value)
    kind._member_map_[value] = member
    kind._value2member_map_[value] = member
    if hasattr(kind, "_hashable_values_"):  # Python 3.12 and later look values up there
        kind._hashable_values_.append(value)
    type.__setattr__(kind, value, member)  # EnumType.__setattr__ refuses to set a member again
    return member


# ------------------------------------------------------------------ folders


def method_folders(package: ModuleType) -> Iterator[ModuleType]:
    """The folders of a package that define a ``METHOD``."""
    for folder in iter_modules(package.__path__):
        if folder.ispkg:
            module = import_module(f"{package.__name__}.{folder.name}")
            if hasattr(module, "METHOD"):
                yield module


def register_folders(package: ModuleType) -> dict[str, object]:
    """Register the methods in the folders of a package.

    Returns:
        ``{name: object}``: the folders' public names, those in ``__all__``.
    """
    exports: dict[str, object] = {}
    for folder in method_folders(package):
        register_method(folder.METHOD)
        exports.update({name: getattr(folder, name) for name in folder.__all__})
    return exports
