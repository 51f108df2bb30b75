"""``sparse-peft run``."""

from __future__ import annotations

import runpy
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from .output import refuse


def run(
    context: typer.Context,
    module: Annotated[str, typer.Argument(help="A module, or a file ending in .py.", metavar="MODULE")],
) -> None:
    """Run a module or script with the sparse methods registered; what follows its name are its arguments."""
    is_file = module.endswith(".py")
    if not (Path(module).is_file() if is_file else _is_module(module)):
        refuse("run", ValueError(f"{module}: no such {'file' if is_file else 'module'}"))
    sys.argv = [module, *context.args]
    if is_file:
        sys.path.insert(0, str(Path(module).absolute().parent))
        runpy.run_path(module, run_name="__main__")
    else:
        sys.path.insert(0, "")
        runpy.run_module(module, run_name="__main__", alter_sys=True)


# the module has options of its own, --help among them
run.context_settings = {  # type: ignore[attr-defined]
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "allow_interspersed_args": False,
}


def _is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):
        return False
