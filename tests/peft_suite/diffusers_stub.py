"""Upstream's helpers import one class of diffusers; where it is not installed, an empty class stands in."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import types
from collections.abc import Iterator


@contextlib.contextmanager
def importable_diffusers() -> Iterator[None]:
    """While it is open, ``from diffusers import StableDiffusionPipeline`` works.

    Closed again at once: PEFT and transformers ask later whether diffusers is there, and must hear the truth.
    """
    if importlib.util.find_spec("diffusers"):
        yield
        return
    stub = types.ModuleType("diffusers")
    stub.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
    sys.modules["diffusers"] = stub
    try:
        yield
    finally:
        del sys.modules["diffusers"]
