"""The command ``sparse-peft``. Each command is a thin layer over functions of the library."""

from __future__ import annotations

import sys
from importlib.util import find_spec


def main() -> None:
    """Entry point of ``sparse-peft``, and of ``python -m sparse_peft.cli``."""
    missing = [name for name in ("typer", "rich") if find_spec(name) is None]
    if missing:
        sys.stderr.write(
            f'sparse-peft needs {" and ".join(missing)} on the command line: pip install "sparse-peft[cli]"\n'
        )
        raise SystemExit(2)
    from .app import app  # noqa: PLC0415  (it needs typer)

    app(prog_name="sparse-peft")
