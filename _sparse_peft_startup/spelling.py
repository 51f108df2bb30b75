"""Names that are meant by misspelt ones: the one place that looks for them."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(given: Iterable[str], known: Iterable[object]) -> str:
    """``"; did you mean 'density'?"``: the known names that are closest to the given ones; "" if none is close."""
    names = [str(name) for name in known]
    close = dict.fromkeys(repr(name) for wrong in given for name in get_close_matches(wrong, names, n=1))
    return f"; did you mean {', '.join(close)}?" if close else ""
