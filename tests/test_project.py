"""Files about the project agree with one another."""

import re
import tomllib
from pathlib import Path

from hatchling.metadata.core import ProjectMetadata
from hatchling.plugin.manager import PluginManager

import sparse_peft
from _sparse_peft_startup.install import install_command

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


def described(**settings):
    """The description of a wheel, as it is built."""
    metadata = ProjectMetadata(str(ROOT), PluginManager())
    metadata.hatch.metadata.hook_config["custom"].update(settings)
    return metadata.core.readme


def test_no_link_of_a_wheels_description_is_relative():
    text = described()
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert len(text) > 5000 and all(link.startswith(("https://", "http://", "#")) for link in links)
    assert "](docs/" in (ROOT / "README.md").read_text()  # where they are relative


def test_links_lead_into_the_repository_once_there_is_one():
    text = described(repository="https://git.example/sparse_peft/")
    links = re.findall(r"\]\(https://git\.example/sparse_peft/(blob|raw)/main/([^)#]*)", text)
    assert len(links) > 20 and {kind for kind, _ in links} == {"blob", "raw"}
    for kind, path in links:
        assert (ROOT / path).exists() and (kind == "raw") == path.endswith(".png"), path


def test_pages_install_the_package_with_the_one_command():
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    found = {
        (path.name, command)
        for path in pages
        for command in re.findall(r"pip install (?:--torch-backend=auto )?(\"?\.[^\s`]*)", path.read_text())
    }
    assert {"README.md", "index.md", "cli.md", "serving.md"} <= {name for name, _ in found}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for page, source in found:
        named = source.strip('".').strip("[]")
        assert f"pip install {source}" == install_command(named), page
        assert set(filter(None, named.split(","))) <= set(extras), page


def test_no_source_of_the_package_installs_it_in_another_way():
    for path in (ROOT / "sparse_peft").rglob("*.py"):
        assert not re.findall(r"pip install \"?(?:\.|sparse)", path.read_text()), path
