"""Entry point of ``sparse-peft``, which starts without torch: each command is imported when it is called."""

from __future__ import annotations

import signal
import sys
from importlib.util import find_spec

from .install import install_advice

# Exit codes of signals are 128 and their number, as shells have it.
INTERRUPTED, TERMINATED = 130, 143


def main() -> None:
    """Run ``sparse-peft``, also as ``python -m sparse_peft.cli``."""
    missing = [name for name in ("typer", "rich") if find_spec(name) is None]
    if missing:
        sys.stderr.write(f"sparse-peft needs {' and '.join(missing)} on the command line: {install_advice('cli')}\n")
        raise SystemExit(2)
    # as exceptions, so that folders which are being written are removed
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        from .commands import app  # noqa: PLC0415  (it needs typer)

        app(prog_name="sparse-peft")
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
