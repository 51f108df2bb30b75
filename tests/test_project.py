"""Files about the project agree with one another."""

import re
import tomllib
from pathlib import Path

import sparse_peft

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_version_is_the_same_everywhere():
    released = re.findall(r"^## \[(\d.*)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    (cited,) = re.findall(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), flags=re.MULTILINE)
    assert released[0] == cited == sparse_peft.__version__


def test_make_installs_every_extra():
    (extras,) = re.findall(r"^EXTRAS := (.+)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert set(extras.split(",")) == set(PROJECT["optional-dependencies"])


def test_every_direct_dependency_is_pinned():
    def names(requirements):
        return {re.split(r"[^\w.-]", line)[0].lower().replace("_", "-") for line in requirements}

    wanted = names(PROJECT["dependencies"]).union(*map(names, PROJECT["optional-dependencies"].values()))
    pinned = names(line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#"))
    assert wanted - {"sparse-peft"} <= pinned
