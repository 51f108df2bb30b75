"""The command line itself: errors in it, words of its options, signals."""

import json
import signal
import subprocess
import sys
import time
from inspect import signature

import pytest

from sparse_peft.cli.app import app
from sparse_peft.cli.compose import compose
from sparse_peft.cli.output import in_words_of
from sparse_peft.registry import methods
from sparse_peft.tuners.unknown_fields import settable_fields

SLOW_MERGE = """
import sys, time
from pathlib import Path
import sparse_peft.cli.merge as merge
from sparse_peft.cli import main

def never_ends(adapter, staging, *args, **kwargs):
    (staging / "half").write_text("x")
    Path(started).write_text("")
    time.sleep(60)

merge.export, started = never_ends, sys.argv.pop()
main()
"""


@pytest.mark.parametrize(
    ("arguments", "command", "message"),
    [
        (["plan", "model", "--nope"], "plan", "No such option: --nope"),
        (["plan"], "plan", "Missing argument 'MODEL'"),
        (["plan", "model", "--batch", "two"], "plan", "Invalid value for '--batch'"),
        (["nope"], "sparse-peft", "No such command 'nope'"),
    ],
)
def test_errors_in_the_command_line_are_json_too(run, arguments, command, message):
    said = run(*arguments, "--json", expect=2).said
    assert said["command"] == command and said["error"]["kind"] == "usage" and message in said["error"]["message"]
    assert message.split("'")[0].split(":")[0] in run(*arguments, expect=2).err.replace("\n", " ")


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("pass ignore_base_names=True", "pass --ignore-base-names"),
        ("use form='merged', or form='low_rank' with a rank", "use --form merged, or --form low_rank with a rank"),
        ("names no base model; pass base=, a loaded model", "names no base model; pass --base, a loaded model"),
        ("rank=4: too many", "--rank 4: too many"),
        ("form='lora' with rank=None: none", "--form lora with rank=None: none"),
        ("weights=0.5,2: 2 numbers", "--weights 0.5,2: 2 numbers"),
        ("density_pattern=3, my_rank=4", "density_pattern=3, my_rank=4"),
    ],
)
def test_errors_of_the_library_name_options(message, words):
    names = {"ignore_base_names", "form", "base", "rank", "weights", "density"}
    assert in_words_of("x", message) == message
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(in_words_of.__globals__["_options"], "x", frozenset(names))
        assert in_words_of("x", message) == words


def test_the_cure_of_a_command_names_its_option(world, run, tmp_path):
    for name in ("sparse", "other"):
        folder = tmp_path / name
        folder.mkdir()
        for path in (world / name).iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": name}))
    arguments = ["compose", tmp_path / "sparse", tmp_path / "other", tmp_path / "out"]
    assert "pass --ignore-base-names" in run(*arguments, expect=1).err
    assert "ignore_base_names" in signature(compose).parameters
    run(*arguments, "--ignore-base-names")


@pytest.mark.parametrize("method", methods(), ids=lambda method: method.name)
def test_fields_of_a_method(run, method):
    said = run("fields", method.name, "--json").said
    assert [field["name"] for field in said["fields"]] == settable_fields(method.config_class)
    assert all(field["help"] and field["expected"] for field in said["fields"])
    assert said["config"] in run("fields", method.name).out


def test_fields_of_no_method(run):
    assert "did you mean 'sparse'?" in run("fields", "spars", "--json", expect=2).said["error"]["message"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_leave_no_traceback_and_no_folder(world, tmp_path, number, code):
    (tmp_path / "outputs").mkdir()
    started = tmp_path / "started"
    arguments = ["merge", str(world / "base"), str(world / "sparse"), str(tmp_path / "outputs" / "out"), str(started)]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_MERGE, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not started.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(list((tmp_path / "outputs").iterdir())) == 1
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in err and out == ""
    assert list((tmp_path / "outputs").iterdir()) == []


def test_every_command_has_a_help(run):
    for command in app.registered_commands:
        assert "Usage" in run(command.callback.__name__, "--help").out
