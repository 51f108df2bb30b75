"""Wording shared by error messages."""

from __future__ import annotations


def layer_prefix(name: str) -> str:
    """The start of an error message about a layer; empty without a name."""
    return f"layer {name}: " if name else ""
