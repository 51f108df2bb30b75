"""``sparse-peft fields``, and config fields as text, ``field=value``, read by the field's annotation."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import MISSING, Field
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..constraints import describe, field_hints, kinds_of
from ..registry import method_named, methods
from ..tuners.base_config import BaseSparseConfig
from ..tuners.unknown_fields import explain_unknown_field, settable_fields
from .output import JsonOption, answering, asked, value_text

METHOD_HELP = f"One of {', '.join(method.name for method in methods())}."
TRUTHS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def fields(
    method: Annotated[str, typer.Argument(help=METHOD_HELP, metavar="METHOD")], as_json: JsonOption = False
) -> None:
    """What the fields of a method's config may hold, their defaults and meanings."""
    with answering("fields", as_json) as answer:
        with asked():
            config_class = method_named(method).config_class
        found = [describe_field(config_class, name) for name in settable_fields(config_class)]
        answer.content = {"method": method_named(method).name, "config": config_class.__name__, "fields": found}
        answer.show = lambda console: show(console, config_class.__name__, found)


def describe_field(config_class: type[BaseSparseConfig], name: str) -> dict[str, Any]:
    """One field for programs."""
    field = config_class.__dataclass_fields__[name]
    return {
        "name": name,
        "default": default_of(field),
        "expected": describe(field_hints(config_class)[name]),
        "help": field.metadata["help"],
    }


def default_of(field: Field[Any]) -> Any:
    """A field's default."""
    return field.default if field.default_factory is MISSING else field.default_factory()


def show(console: Console, config: str, found: list[dict[str, Any]]) -> None:
    """The fields for people."""
    console.print(f"[bold]{config}[/]")
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for title in ("field", "default", "meaning, and what it may hold"):
        grid.add_column(title, overflow="fold")
    for field in found:
        meaning = f"{escape(field['help'])}\n[dim]{escape(field['expected'])}[/]"
        grid.add_row(field["name"], escape(value_text(field["default"])), meaning)
    console.print(grid)


def option_help(name: str, method: str = "sparse") -> str:
    """The help of an option that is a field of a method's config."""
    config_class = method_named(method).config_class
    text = config_class.__dataclass_fields__[name].metadata["help"]
    expected = describe(field_hints(config_class)[name]).removesuffix(" or None")
    return f"{text} {expected[0].upper()}{expected[1:]}."


# ---------------------------------------------------------------------------------------------------- reading


def parse_fields(config_class: type[BaseSparseConfig], settings: Iterable[str]) -> dict[str, Any]:
    """``["density=0.01", "target_modules=q_proj,v_proj"]`` as keyword arguments of a config.

    Lists are written with commas, dicts as JSON, and nothing as ``none``.

    Raises:
        ValueError: no ``field=value``, a field that the config does not have, or a value of another type; names the
            field and what would be right.
    """
    hints = field_hints(config_class)
    found: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        name = name.strip().replace("-", "_")
        if not equals:
            raise ValueError(f"{setting!r}: field=value is expected, such as {settable_fields(config_class)[0]}=...")
        check_field(config_class, name)
        found[name] = parse_value(name, text.strip(), hints[name])
    return found


def check_field(config_class: type[BaseSparseConfig], name: str) -> str:
    """The name, if the config has such a field.

    Raises:
        ValueError: it has not; says which field may be meant.
    """
    if name in settable_fields(config_class):
        return name
    raise ValueError(f"{config_class.__name__} has no field {name!r}: {explain_unknown_field(config_class, name)}")


def parse_value(name: str, text: str, hint: Any) -> Any:
    """One field's value, of one of its types; the config compares it with the field's range.

    Raises:
        ValueError: the text is none of the field's types.
    """
    kinds = kinds_of(hint)
    if type(None) in kinds and text.lower() in ("none", "null"):
        return None
    if (text[:1] == "[" and list in kinds) or (text[:1] == "{" and dict in kinds):
        try:
            return json.loads(text)
        except ValueError as error:
            raise ValueError(f"{name}={text}: no valid JSON ({error})") from error
    if bool in kinds and text.lower() in TRUTHS:
        return TRUTHS[text.lower()]
    number = _number(text, kinds)
    if number is not None:
        return number
    if list in kinds and (str not in kinds or _is_list_of_names(text)):
        item = kinds[list][0]
        return [parse_value(name, part.strip(), item) for part in text.split(",") if part.strip()]
    if str in kinds:
        return text
    raise ValueError(f"{name}={text!r}: {describe(hint)} is expected")


def _number(text: str, kinds: Iterable[Any]) -> int | float | None:
    if int in kinds and re.fullmatch(r"[+-]?\d[\d_]*", text):
        return int(text)
    try:
        return float(text) if float in kinds else None
    except ValueError:
        return None


def _is_list_of_names(text: str) -> bool:
    # a bare string is a regular expression to PEFT, which a name alone would hardly match
    return text != "all-linear" and re.fullmatch(r"[\w.]+(\s*,\s*[\w.]+)*,?", text) is not None
