import json
from types import SimpleNamespace

import pytest

pytest.importorskip("typer")
from typer.testing import CliRunner

from _sparse_peft_startup.commands import app


@pytest.fixture
def run():
    """Run a command: its exit code, stdout, stderr and, with --json, what it said."""

    def call(*arguments, expect=0):
        done = CliRunner(env={"COLUMNS": "120"}).invoke(app, [str(argument) for argument in arguments])
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        assert expect in (None, done.exit_code), (done.stdout, done.stderr)
        said = json.loads(done.stdout) if "--json" in arguments else None
        return SimpleNamespace(out=done.stdout, err=done.stderr, said=said)

    return call
