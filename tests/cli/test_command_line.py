"""The command line itself: errors in it, words of its options, signals."""

import json
import re
import signal
import subprocess
import sys
import time
from inspect import signature

import pytest

from _sparse_peft_startup.commands import COMMANDS, package_folder, summary
from sparse_peft.cli.compose import compose
from sparse_peft.cli.output import in_words_of
from sparse_peft.registry import methods
from sparse_peft.tuners.unknown_fields import settable_fields
from tests.helpers.processes import run_code, run_module, started_code

PASS_ON = {"train", "run"}  # their options are those of other programs

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
        (["plan", "model", "--nope"], "plan", "No such option"),
        (["plan"], "plan", "Missing argument 'MODEL'"),
        (["plan", "model", "--batch", "two"], "plan", "Invalid value for '--batch'"),
        (["nope"], "sparse-peft", "No such command 'nope'"),
        (["docter"], "sparse-peft", "No such command 'docter'; did you mean 'doctor'?"),
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


@pytest.mark.subprocess
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_leave_no_traceback_and_no_folder(world, tmp_path, number, code):
    (tmp_path / "outputs").mkdir()
    started = tmp_path / "started"
    arguments = ["merge", str(world / "base"), str(world / "sparse"), str(tmp_path / "outputs" / "out"), str(started)]
    with started_code(SLOW_MERGE, *arguments) as process:
        deadline = time.monotonic() + 600  # imports on a busy machine
        while not started.exists() and process.runs and time.monotonic() < deadline:
            time.sleep(0.1)
        assert len(list((tmp_path / "outputs").iterdir())) == 1
        process.send_signal(number)
        done = process.completed(timeout=60)
    assert done.returncode == code and "Traceback" not in done.stderr and done.stdout == ""
    assert list((tmp_path / "outputs").iterdir()) == []


def test_every_command_has_a_help(run):
    listed = run("--help").out
    for command in COMMANDS:
        first = summary(command).split()[:3]
        assert re.search(rf"{command} +{' '.join(first)}", listed)
        if command not in PASS_ON:
            assert f" {command} [OPTIONS]" in run(command, "--help").out


def test_every_command_is_a_module_and_every_module_with_one_a_command():
    modules = {path.stem: path.read_text() for path in (package_folder() / "cli").glob("*.py")}
    assert {name for name, source in modules.items() if f"\ndef {name}(" in source} == set(COMMANDS)


def test_the_list_of_commands_needs_no_torch():
    code = "import sys\nfrom _sparse_peft_startup.command import main\nsys.argv[1:] = ['--help']\n"
    code += "try: main()\nfinally: print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    modules = done.stdout.splitlines()[-1].split()
    assert done.returncode == 0 and "doctor" in done.stdout and "typer" in modules
    assert not {"torch", "transformers", "peft", "sparse_peft"} & set(modules)


def test_run_gives_a_module_its_arguments(tmp_path):
    file = tmp_path / "script.py"
    file.write_text("import sys\nfrom peft import PeftType\nprint(PeftType('SPARSE_PEFT_DELTA').name, sys.argv[1:])\n")
    done = run_module("sparse_peft.cli", "run", file, "--help", "-x")
    assert done.returncode == 0 and done.stdout == "SPARSE_PEFT_DELTA ['--help', '-x']\n", done.stderr
    done = run_module("sparse_peft.cli", "run", "json.tool", "--help")
    assert done.returncode == 0 and "usage: " in done.stdout
    assert "no such module" in run_module("sparse_peft.cli", "run", "no.module").stderr


NOTICES = """
import logging, os, sys, warnings
from _sparse_peft_startup import command
os.environ.pop("HF_DATASETS_DISABLE_PROGRESS_BARS", None)
sys.argv[1:] = {arguments}
try:
    command.main()
except SystemExit:
    pass
logging.getLogger("bitsandbytes.backends.cpu.ops").warning("a missing kernel")
logging.getLogger("transformers").warning("a warning in a log")
for category, module in ((FutureWarning, "transformers.x"), (DeprecationWarning, "__main__"), (UserWarning, "trl.x"),
                         (FutureWarning, "sparse_peft.x")):
    warnings.warn_explicit(f"{{category.__name__}} of {{module}}", category, "file.py", 1, module)
print(os.environ.get("HF_DATASETS_DISABLE_PROGRESS_BARS"), file=sys.stderr)
"""


def notices(*arguments):
    """What of other packages' notices a command lets through; they come on some machines only, so they are sent."""
    done = run_code(NOTICES.format(arguments=list(arguments)), env={"PYTHONWARNINGS": "default"})
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_notices_of_other_packages_are_quiet_and_warnings_are_not():
    said = notices("fields", "sora")
    assert "a missing kernel" not in said and "FutureWarning of transformers.x" not in said
    assert "DeprecationWarning of __main__" not in said and said.endswith("\n1\n")
    for words in ("a warning in a log", "UserWarning of trl.x", "FutureWarning of sparse_peft.x"):
        assert words in said


@pytest.mark.parametrize("arguments", [("--verbose", "fields", "sora"), ("fields", "sora", "--verbose")])
def test_verbose_shows_all(arguments):
    said = notices(*arguments)
    for words in ("a missing kernel", "FutureWarning of transformers.x", "UserWarning of trl.x"):
        assert words in said
    assert said.endswith("\nNone\n")


def test_other_programs_say_what_they_like(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("print('ran')")
    said = notices("run", str(script))
    assert "a missing kernel" not in said and "FutureWarning of transformers.x" in said
