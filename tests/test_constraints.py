"""Annotations of fields: what they accept, what they convert, and how they refuse."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pytest
import torch

from sparse_peft.constraints import (
    Count,
    CountOrZero,
    Limits,
    Names,
    OneOf,
    Pattern,
    Positive,
    Probability,
    Share,
    Steps,
    describe,
    validate_fields,
    validated,
)

COLOURS = {"red": 1, "green": 2}
Colour = Annotated[str, OneOf(COLOURS)]


@pytest.mark.parametrize(
    ("value", "hint", "kept"),
    [
        (np.float32(0.5), Share, 0.5),
        (torch.tensor(0.5, dtype=torch.bfloat16), Share, 0.5),
        (np.int64(3), Count, 3),
        (np.array(3), Count, 3),
        (torch.tensor(3), Count | None, 3),
        (np.bool_(True), bool, True),
        (np.str_("red"), Colour, "red"),
        (Path("a/b"), str | None, "a/b"),
        (1, Share, 1),
        (None, Share | None, None),
        ((2, np.int32(3)), list[Count], [2, 3]),
        (range(2), list[int] | int | None, [0, 1]),
        (np.arange(2), list[int], [0, 1]),
        ({"b", "a"}, list[str] | None, ["a", "b"]),
        (["b", "a"], Names | Pattern | None, {"a", "b"}),
        ({"q.*": np.float64(0.5)}, dict[Pattern, Share], {"q.*": 0.5}),
        ({"a": [1, {"b": (None, True)}]}, dict | None, {"a": [1, {"b": [None, True]}]}),
        (np.int8(2), Steps, 2),
        (np.float16(1), Steps, 1.0),
        ("low", Literal["low", "high"], "low"),
        (float("inf"), Annotated[float, Limits(least=1, finite=False)], float("inf")),
    ],
)
def test_accepted_and_kept_as_plain_python(value, hint, kept):
    found = validated("field", value, hint)
    assert found == kept and type(found) is type(kept)


@pytest.mark.parametrize(
    ("value", "hint", "error", "message"),
    [
        (True, Count, TypeError, "field=True: an int of at least 1 is expected"),
        (2.0, Count, TypeError, "field=2.0: an int of at least 1"),
        (0, Count | None, ValueError, "field=0: an int of at least 1 or None is expected"),
        (2**63, CountOrZero, ValueError, "field=9223372036854775808: an int of at least 0"),
        pytest.param(10**5000, int, ValueError, r"field=\(int\): an int is expected", id="long"),
        (float("nan"), Positive, ValueError, "field=nan: a number above 0"),
        (10**400, Positive, ValueError, "field=1000"),
        ("1", Positive, TypeError, "field='1': a number above 0"),
        (1.5, Share, ValueError, r"field=1.5: a share in \(0, 1\] is expected"),
        (1, Probability, ValueError, r"field=1: a probability in \[0, 1\)"),
        (1, bool, TypeError, "field=1: True or False is expected"),
        (-1, Steps, ValueError, "field=-1: a number of optimizer steps .int. of at least 0 or a share of the run"),
        (0, Annotated[int, Limits(above=0)] | Annotated[float, Limits(least=0)], ValueError, "field=0"),
        ("gren", Colour, ValueError, "field='gren': one of 'red', 'green' is expected; did you mean 'green'"),
        ({}, Colour, TypeError, "field={}: one of 'red', 'green'"),
        ("mid", Literal["low", "high"], ValueError, "field='mid': one of 'low', 'high'"),
        ("lm_head", list[str] | None, TypeError, r"field='lm_head': .* is expected; write \['lm_head'\]"),
        (["a", 3], list[str], TypeError, r"field\[1\]=3: a string is expected"),
        ("(", Names | Pattern | None, ValueError, r"field='\(': .*missing \), unterminated subpattern"),
        ({"(": 0.1}, dict[Pattern, Share], ValueError, r"field: key='\(': a name or regular expression"),
        ({3: 0.1}, dict[Pattern, Share], TypeError, "field: key=3"),
        ({"q": 2}, dict[Pattern, Share], ValueError, r"field\['q'\]=2: a share"),
        (3, dict[Pattern, Share], TypeError, r"field=3: a dict with a share in \(0, 1\] as each value"),
        ({"a": object()}, dict | None, TypeError, r"field\['a'\]=<object"),
        ({"a": [float("nan")]}, dict | None, ValueError, r"field\['a'\]\[0\]=nan"),
        (torch.zeros(2), Share, TypeError, r"field=tensor\(\[0., 0.\]\)"),
        (torch.empty((), device="meta"), Share, TypeError, "field=tensor"),
        ("x" * 100, Count, TypeError, "field='x{79}[.]{3}: an int"),
    ],
)
def test_refused_by_name_value_and_expectation(value, hint, error, message):
    with pytest.raises(error, match=message):
        validated("field", value, hint)


def test_choices_that_are_added_later():
    names = {"a": 1}
    hint = Annotated[str, OneOf(names, ("b",))]
    with pytest.raises(ValueError, match="one of 'a', 'b'"):
        validated("field", "c", hint)
    names["c"] = 2
    assert validated("field", "c", hint) == "c" and describe(hint) == "one of 'a', 'c', 'b'"


def test_fields_of_a_frozen_dataclass():
    @dataclass(frozen=True)
    class Options:
        count: Count = 1
        share: Share | None = None

        def __post_init__(self):
            validate_fields(self)

    # annotations of a local class are no strings here, so nothing has to be looked up by name
    assert type(Options(np.int64(2)).count) is int
    with pytest.raises(ValueError, match="share=2"):
        Options(1, 2)
