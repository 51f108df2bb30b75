"""Virtual environments with an installed sparse_peft over the packages of the tests' own environment."""

import os
import subprocess
import sys
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


class Environment:
    """An environment in a folder that sees the packages around it, but not their ``.pth`` files."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, symlinks=True)
        self.python = folder / "bin" / "python"
        (self.site,) = folder.glob("lib/python*/site-packages")
        found = filter(None, map(find_spec, ("torch", "hatchling", "editables", "lm_eval", "fastapi")))
        (self.site / "shared.pth").write_text("\n".join({str(Path(spec.origin).parents[1]) for spec in found}))

    def pip(self, *arguments: object) -> None:
        """Run this environment's pip, without a package index."""
        command = [sys.executable, "-m", "pip", "--python", self.python, *arguments, "--quiet"]
        done = subprocess.run([*map(str, command)], env=_environ(), capture_output=True, text=True, cwd=self.site)
        assert done.returncode == 0, done.stderr

    def install(self, *arguments: object) -> None:
        """Install a checkout or a wheel alone."""
        self.pip("install", "--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed", *arguments)

    def run(
        self, *arguments: object, expect: int = 0, typed: str = "", **env: str
    ) -> subprocess.CompletedProcess[str]:
        """Run the interpreter in a folder without packages, with ``typed`` as its input."""
        command = [str(self.python), *map(str, arguments)]
        where = {"env": _environ() | env, "cwd": self.site.parent}
        done = subprocess.run(command, input=typed, capture_output=True, text=True, **where)
        assert done.returncode == expect, (done.stdout, done.stderr)
        return done

    @contextmanager
    def running(self, *arguments: object) -> Iterator[subprocess.Popen[bytes]]:
        """Run the interpreter likewise for the block, at whose end it is killed."""
        command = [str(self.python), *map(str, arguments)]
        with subprocess.Popen(command, env=_environ(), cwd=self.site.parent) as process:
            try:
                yield process
            finally:
                process.kill()


def environment(folder: Path) -> Environment:
    """A new environment; the test is skipped where packages cannot be built."""
    for name in ("hatchling", "editables", "pip"):
        pytest.importorskip(name)
    return Environment(folder)


def _environ() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "SPARSE_PEFT_AUTOLOAD")}
