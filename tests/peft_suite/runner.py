"""Runs pytest on one upstream file in a process of its own and reads the result."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .cases import METHODS_VARIABLE
from .models import BY_FILE, models_folder
from .mutants import MUTANT_VARIABLE
from .upstream import PACKAGE, TEST_FILES, cache_folder, upstream_folder

FILE_VARIABLE = "SPARSE_PEFT_SUITE_FILE"
REPORT_VARIABLE = "SPARSE_PEFT_SUITE_REPORT"


@dataclasses.dataclass(frozen=True)
class Result:
    """Counts of one file; ``failures`` are node ids, ``skips`` pairs of node id and reason, ``output`` is pytest's."""

    file: str
    returncode: int
    passed: int
    skipped: int
    xfailed: int
    xpassed: int
    failures: list[str]
    skips: list[list[str]]
    seconds: float
    output: str

    @property
    def good(self) -> bool:
        """True if pytest was content, which it is not when a test failed or none was collected."""
        return self.returncode == 0 and self.passed > 0


def run_file(
    file: str,
    *,
    methods: list[str] | None = None,
    workers: int = 0,
    expression: str | None = None,
    mutant: str | None = None,
    echo: bool = False,
) -> Result:
    """Runs one of ``TEST_FILES`` ("custom") against ``methods`` (names in ``cases.CASES``; None: all but baselines).

    Raises:
        UpstreamUnavailableError: see ``upstream_folder``.
    """
    folder = upstream_folder()
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch, "report.json")
        command = [sys.executable, "-m", "pytest", f"{folder / PACKAGE / TEST_FILES[file]}.py"]
        command += ["-p", f"{__package__}.plugin", "-p", "no:cacheprovider"]
        command += ["-c", os.devnull, "--rootdir", str(folder)]
        command += ["-q", "--tb=short", "--disable-warnings", "--basetemp", str(Path(scratch, "tmp"))]
        if workers:
            command += ["-n", str(workers)]
        if expression:
            command += ["-k", expression]
        # Started from within pytest, the inner one must not take itself for a worker of the outer one.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        environment = {
            **inherited,
            "HF_HUB_OFFLINE": "1",
            FILE_VARIABLE: file,
            REPORT_VARIABLE: str(report),
            METHODS_VARIABLE: ",".join(methods or []),
            MUTANT_VARIABLE: mutant or "",
            # the inner process imports what this one would, be it the checkout or an installed package
            "PYTHONPATH": os.pathsep.join(
                [_import_root(), str(folder), *(str(Path(path).absolute()) for path in sys.path)]
            ),
        }
        # The models are tiny: a second thread costs more than it brings.
        environment.setdefault("OMP_NUM_THREADS", "1")
        cwd = models_folder(cache_folder()) if file in BY_FILE else scratch
        start = time.monotonic()
        done = subprocess.run(command, cwd=cwd, env=environment, text=True, **({} if echo else _CAPTURE))
        seconds = time.monotonic() - start
        counts = json.loads(report.read_text(encoding="utf-8")) if report.is_file() else _NOTHING_RAN
    return Result(file=file, returncode=done.returncode, seconds=seconds, output=done.stdout or "", **counts)


_CAPTURE = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
_NOTHING_RAN = {"passed": 0, "skipped": 0, "xfailed": 0, "xpassed": 0, "failures": [], "skips": []}


def _import_root() -> str:
    """The folder from which this package imports under its present name (``tests.peft_suite`` or ``peft_suite``)."""
    return str(Path(__file__).resolve().parents[__package__.count(".") + 1])
