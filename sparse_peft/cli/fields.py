"""Config fields as text: ``field=value``, read by the field's type."""

from __future__ import annotations

import json
import re
import types
from collections.abc import Iterable
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, Union, get_args, get_origin, get_type_hints

from peft import PeftConfig

from ..tuners.base_config import BaseSparseConfig

WORDS = {bool: "true or false", int: "an int", float: "a number", str: "a word", type(None): "none"}
BUDGETS = ("density", "ratio", "k", "num_params", "r")
TRUTHS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def settable_fields(config_class: type[BaseSparseConfig]) -> list[str]:
    """The fields of a config that are set by hand."""
    hidden = {*PeftConfig.__dataclass_fields__, *config_class.resolved_fields}
    return [field.name for field in fields(config_class) if field.name not in hidden]


def parse_fields(config_class: type[BaseSparseConfig], settings: Iterable[str]) -> dict[str, Any]:
    """``["density=0.01", "target_modules=q_proj,v_proj"]`` as keyword arguments of a config.

    Lists are written with commas, dicts as JSON, and nothing as ``none``.

    Raises:
        ValueError: no ``field=value``, a field that the config does not have, or a value of another type; names the
            field and what would be right.
    """
    hints, known = get_type_hints(config_class), settable_fields(config_class)
    found: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        name = name.strip().replace("-", "_")
        if not equals:
            raise ValueError(f"{setting!r}: field=value is expected, such as {known[0]}=...")
        check_field(config_class, name)
        found[name] = parse_value(name, text.strip(), hints[name])
    return found


def check_field(config_class: type[BaseSparseConfig], name: str) -> str:
    """The name, if the config has such a field.

    Raises:
        ValueError: it has not; the closest one is named.
    """
    known = settable_fields(config_class)
    if name in known:
        return name
    close = get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        hint = f"did you mean {close[0]!r}?"
    elif name in BUDGETS:
        hint = f"how much trains is said by {', '.join(budget for budget in BUDGETS if budget in known)}"
    else:
        hint = f"it has {', '.join(known)}"
    raise ValueError(f"{config_class.__name__} has no field {name!r}: {hint}")


def parse_value(name: str, text: str, hint: Any) -> Any:
    """One field's value.

    Raises:
        ValueError: the text is none of the field's types.
    """
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    plain = [kind for kind in kinds if get_origin(kind) is None]
    lists = [kind for kind in kinds if get_origin(kind) is list]
    dicts = [kind for kind in kinds if get_origin(kind) is dict]
    if type(None) in plain and text.lower() in ("none", "null"):
        return None
    if text[:1] in ("[", "{") and (lists or dicts):
        try:
            value = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{name}={text}: no valid JSON ({error})") from error
        if (isinstance(value, dict) and not dicts) or (isinstance(value, list) and not lists):
            raise ValueError(f"{name}={text}: {_expected(kinds)} is expected")
        return value
    if bool in plain and text.lower() in TRUTHS:
        return TRUTHS[text.lower()]
    if int in plain and re.fullmatch(r"[+-]?\d[\d_]*", text):
        return int(text)
    if float in plain:
        try:
            return float(text)
        except ValueError:
            pass
    if lists and (str not in plain or _is_list_of_names(text)):
        (item,) = get_args(lists[0])
        return [parse_value(name, part.strip(), item) for part in text.split(",") if part.strip()]
    if str in plain:
        return text
    raise ValueError(f"{name}={text!r}: {_expected(kinds)} is expected")


def _is_list_of_names(text: str) -> bool:
    # a bare string is a regular expression to PEFT, which a name alone would hardly match
    return text != "all-linear" and re.fullmatch(r"[\w.]+(\s*,\s*[\w.]+)*,?", text) is not None


def _expected(kinds: tuple) -> str:
    words = []
    for kind in kinds:
        if get_origin(kind) is list:
            words.append("a list, such as a,b")
        elif get_origin(kind) is dict:
            words.append('a JSON object, such as {"v_proj": 0.05}')
        else:
            words.append(WORDS.get(kind, str(kind)))
    return " or ".join(words)
