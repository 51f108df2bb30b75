"""Whether what a config file says is of its fields' types: a file may come from anyone."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from typing import Any

INT_LIMIT = 2**63


def check_field_types(config_cls: type, values: Mapping[str, Any], where: str) -> None:
    """Compare the values of a JSON object with the annotations of a config class.

    Args:
        config_cls: a dataclass; names it has no annotation for are left to PEFT, which drops them with a warning.
        values: as ``json`` reads them.
        where: the file, for the message.

    Raises:
        TypeError: names the file, the field, the value and the type.
    """
    hints = typing.get_type_hints(config_cls)
    for name, value in values.items():
        if name in hints and not matches(value, hints[name]):
            shown = repr(value)
            shown = shown if len(shown) <= 80 else f"{shown[:80]}..."
            expected = str(hints[name]).replace("typing.", "").removeprefix("<class '").removesuffix("'>")
            raise TypeError(
                f"{where}: {name}={shown}: {expected} is expected; the file is damaged, or written by hand: save or "
                "download the adapter again"
            )


def matches(value: Any, hint: Any) -> bool:
    """Whether a value read from JSON can stand for a field of this type; what is not known of types is let pass."""
    if hint is Any:
        return True
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(matches(value, option) for option in arguments)
    if origin is typing.Literal:
        return value in arguments
    kind = origin or hint
    if kind in (list, set, tuple):
        item = arguments[0] if arguments else Any
        return isinstance(value, (list, set, tuple)) and all(matches(element, item) for element in value)
    if kind is dict:
        of = arguments[1] if arguments else Any
        return isinstance(value, dict) and all(isinstance(k, str) and matches(v, of) for k, v in value.items())
    if kind in (int, float):
        if isinstance(value, int) and not isinstance(value, bool):
            return abs(value) < INT_LIMIT
        return kind is float and isinstance(value, float)
    return isinstance(value, kind) if isinstance(kind, type) else True
