"""What a field may hold, said once, in its annotation: types, ranges, choices; and the one check that reads it.

Configs, budgets and options annotate their fields with these types. ``validated`` compares a value with an annotation:
in a constructor, when an attribute is set, when a file is read and on the command line. Ranges lie in annotations and
not in the fields' metadata: parsers such as transformers' ``HfArgumentParser`` hand metadata to argparse, and items of
lists and values of dicts have ranges, too.
"""

from __future__ import annotations

import math
import os
import re
import types
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache, lru_cache
from typing import Annotated, Any, ClassVar, Literal, Protocol, Union, get_args, get_origin, get_type_hints

import numpy as np
from torch import Tensor

from _sparse_peft_startup.spelling import did_you_mean

INT_LIMIT = 2**63
"""Integers must fit 64 bits: files and tensors have no more."""
MOST_SHOWN = 80  # characters of a value in an error


class Constraint(Protocol):
    """Anything in an annotation that values are compared with."""

    def describe(self, kind: str) -> str:
        """What is expected; ``kind`` is the type's own description."""
        ...

    def refusal(self, value: Any) -> str | None:
        """None for a value that is allowed, otherwise what to add to the error, which may be empty."""
        ...


@dataclass(frozen=True)
class Limits:
    """A range of numbers.

    Args:
        least: the smallest number.
        above: numbers are larger than this.
        most: the largest number.
        below: numbers are smaller than this.
        noun: what the number is, for errors: ``"a share"``.
        finite: whether infinity is refused, and so are ints of more than 64 bits.
    """

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    noun: str | None = None
    finite: bool = True

    def describe(self, kind: str) -> str:
        noun = self.noun or kind
        low = self.least if self.above is None else self.above
        high = self.most if self.below is None else self.below
        if low is not None and high is not None:
            return f"{noun} in {'[' if self.above is None else '('}{low}, {high}{']' if self.below is None else ')'}"
        if low is not None:
            return f"{noun} of at least {low}" if self.above is None else f"{noun} above {low}"
        if high is not None:
            return f"{noun} of at most {high}" if self.below is None else f"{noun} below {high}"
        return noun

    def refusal(self, value: float) -> str | None:
        is_inside = (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )
        return None if is_inside else ""


@dataclass(frozen=True, eq=False)
class OneOf:
    """A choice among the names in some collections, which may grow after the annotation is made."""

    collections: tuple[Collection[Any], ...]

    def __init__(self, *collections: Collection[Any]) -> None:
        object.__setattr__(self, "collections", collections)

    @property
    def names(self) -> list[Any]:
        """All that may be chosen."""
        return [name for names in self.collections for name in names]

    def describe(self, kind: str) -> str:
        return f"one of {', '.join(map(repr, self.names))}"

    def refusal(self, value: Any) -> str | None:
        if value in self.names:
            return None
        return did_you_mean([str(value)], self.names)


@dataclass(frozen=True)
class Regex:
    """A text that compiles as a regular expression; a name is one."""

    def describe(self, kind: str) -> str:
        return "a name or regular expression"

    def refusal(self, value: str) -> str | None:
        try:
            re.compile(value)
        except (re.error, RecursionError, OverflowError) as error:
            return f" ({error})"
        return None


@dataclass(frozen=True)
class AsSet:
    """A list whose order means nothing; it is kept as a set, as PEFT does."""

    def describe(self, kind: str) -> str:
        return "a list of names"

    def refusal(self, value: Any) -> str | None:
        return None


Share = Annotated[float, Limits(above=0, most=1, noun="a share")]
ShareOrZero = Annotated[float, Limits(least=0, most=1, noun="a share")]
Probability = Annotated[float, Limits(least=0, below=1, noun="a probability")]
Positive = Annotated[float, Limits(above=0)]
PositiveOrZero = Annotated[float, Limits(least=0)]
Count = Annotated[int, Limits(least=1)]
CountOrZero = Annotated[int, Limits(least=0)]
Steps = (
    Annotated[int, Limits(least=0, noun="a number of optimizer steps (int)")]
    | Annotated[float, Limits(least=0, most=1, noun="a share of the run (float)")]
)
"""When something happens during training."""
Pattern = Annotated[str, Regex()]
Names = Annotated[list[str], AsSet()]


@dataclass(frozen=True)
class _Option:
    """One type of a union, with what is asked of it."""

    kind: Any
    arguments: tuple[Any, ...] = ()
    constraints: tuple[Any, ...] = ()

    NOUNS: ClassVar[dict[Any, str]] = {
        int: "an int", float: "a number", str: "a string", bool: "True or False", type(None): "None",
        list: "a list", dict: "a dict",
    }  # fmt: skip
    PLURALS: ClassVar[dict[str, str]] = {"an int": "ints", "a number": "numbers", "a string": "strings"}

    def describe(self) -> str:
        text = self.NOUNS.get(self.kind) or f"a {getattr(self.kind, '__name__', self.kind)}"
        if self.arguments:
            part = describe(self.arguments[-1])
            each = "item" if self.kind is list else "value"
            text = f"{text} of {self.PLURALS[part]}" if part in self.PLURALS else f"{text} with {part} as each {each}"
        for constraint in self.constraints:
            text = constraint.describe(text)
        return text

    def is_kind_of(self, value: Any) -> bool:
        """Whether the value has this type; annotations that are no classes accept everything."""
        if self.kind in (int, float):
            numbers = (int,) if self.kind is int else (int, float)
            return isinstance(value, numbers) and not isinstance(value, bool)
        if self.kind is list:
            return isinstance(value, (list, tuple, set, frozenset, range, np.ndarray, Tensor))
        if self.kind is dict:
            return isinstance(value, Mapping)
        return self.kind is Any or not isinstance(self.kind, type) or isinstance(value, self.kind)

    def take(self, name: str, value: Any) -> Any:
        """The value as it is kept, its parts checked."""
        if self.kind is list:
            return self._take_list(name, value)
        if self.kind is dict:
            return self._take_dict(name, value)
        return value

    def _take_list(self, name: str, value: Any) -> list[Any] | set[Any]:
        kind = self.arguments[0] if self.arguments else _JSON
        items = value.tolist() if isinstance(value, (np.ndarray, Tensor)) else list(value)
        items = [validated(f"{name}[{i}]", item, kind) for i, item in enumerate(items)]
        if any(isinstance(constraint, AsSet) for constraint in self.constraints):
            return set(items)
        return sorted(items) if isinstance(value, (set, frozenset)) else items

    def _take_dict(self, name: str, value: Mapping[Any, Any]) -> dict[Any, Any]:
        key_kind, kind = self.arguments or (str, _JSON)
        return {
            validated(f"{name}: key", key, key_kind): validated(f"{name}[{key!r}]", item, kind)
            for key, item in value.items()
        }

    def refusal(self, value: Any) -> str | None:
        """What speaks against the value, apart from its type; None for nothing."""
        if self.kind in (int, float) and not self._is_ordinary(value):
            return ""
        refusals = (constraint.refusal(value) for constraint in self.constraints)
        return next((refusal for refusal in refusals if refusal is not None), None)

    def _is_ordinary(self, value: float) -> bool:
        if not all(getattr(constraint, "finite", True) for constraint in self.constraints):
            return isinstance(value, int) or not math.isnan(value)
        return -INT_LIMIT <= value < INT_LIMIT if isinstance(value, int) else math.isfinite(value)


# of lists and dicts whose parts have no annotation: what a JSON file holds and gives back equal
_JSON = dict | list | str | bool | int | float | None


@lru_cache(maxsize=1024)
def _options_of(hint: Any) -> tuple[_Option, ...]:
    """The types of an annotation, in their order."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return tuple(option for argument in arguments for option in _options_of(argument))
    if origin is Literal:
        return (_Option(type(arguments[0]), (), (OneOf(arguments),)),)
    if origin is Annotated:
        inner, *constraints = arguments
        options = _options_of(inner)
        return tuple(replace(option, constraints=(*option.constraints, *constraints)) for option in options)
    return (_Option(origin or hint, arguments),)


def describe(hint: Any) -> str:
    """What an annotation allows, in words: ``"a share in (0, 1] or None"``."""
    *others, last = dict.fromkeys(option.describe() for option in _options_of(hint))
    return f"{', '.join(others)} or {last}" if others else last


def kinds_of(hint: Any) -> dict[Any, tuple[Any, ...]]:
    """``{type: annotations of its parts}`` of an annotation's types, such as ``{list: (str,), NoneType: ()}``."""
    return {option.kind: option.arguments for option in _options_of(hint)}


def plain(value: Any) -> Any:
    """A scalar of NumPy or torch as Python's, a path as a str, and anything else as it is."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, np.generic) or (isinstance(value, (np.ndarray, Tensor)) and value.ndim == 0):
        return value if getattr(value, "is_meta", False) else value.item()
    return value


def validated(name: str, value: Any, hint: Any) -> Any:
    """The value as a field of this annotation keeps it: plain Python that a JSON file gives back equal.

    The first type of a union that the value has decides.

    Args:
        name: the field's, for errors.
        value: of any type.
        hint: the annotation, such as ``Share | None``.

    Raises:
        TypeError: none of the annotation's types.
        ValueError: out of range, or no such choice.
    """
    given, value = value, plain(value)
    option = next((option for option in _options_of(hint) if option.is_kind_of(value)), None)
    if option is None:
        raise TypeError(f"{name}={_shown(given)}: {describe(hint)} is expected{_cure(value, hint)}")
    value = option.take(name, value)
    refusal = option.refusal(value)
    if refusal is not None:
        raise ValueError(f"{name}={_shown(given)}: {describe(hint)} is expected{refusal}")
    return value


def _cure(value: Any, hint: Any) -> str:
    takes_names = any(option.kind is list and option.arguments == (str,) for option in _options_of(hint))
    return f"; write [{value!r}]" if isinstance(value, str) and takes_names else ""


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python prints no int of thousands of digits
        return f"({type(value).__name__})"
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


def field_hints(cls: Any) -> dict[str, Any]:
    """``{field name: annotation}`` of a dataclass, constraints included."""
    return _field_hints(cls)


@cache
def _field_hints(cls: Any) -> dict[str, Any]:
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in fields(cls)}


def validate_fields(instance: Any) -> None:
    """Compare all fields of a dataclass with their annotations, and convert what is not plain Python.

    Raises:
        TypeError, ValueError: the first field that does not fit; names it, its value and what is expected.
    """
    for name, hint in field_hints(type(instance)).items():
        object.__setattr__(instance, name, validated(name, getattr(instance, name), hint))
