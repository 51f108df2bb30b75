"""Every line of docs/cli.md that calls the program does what it says, on small models."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"
COMMANDS = [
    line.strip()
    for block in re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
    if line.startswith("sparse-peft ")
]


def test_the_lines_of_the_page_run(world, stand_in, run, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    for name, folder in {"base": "base", "adapter": "sparse", "other": "other", "channels": "s2ft"}.items():
        shutil.copytree(world / folder, tmp_path / name)
        if name != "base":
            path = tmp_path / name / "adapter_config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "base"}))
    shutil.copytree(stand_in, tmp_path / "model")
    (tmp_path / "text.txt").write_text("In the beginning God created the heaven and the earth. " * 400)
    (tmp_path / "llama-7b").mkdir()
    shutil.copy(world / "base" / "config.json", tmp_path / "llama-7b")
    monkeypatch.chdir(tmp_path)
    assert len(COMMANDS) > 10
    for command in COMMANDS:
        assert run(*shlex.split(command)[1:]).out, command
