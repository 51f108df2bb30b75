"""The example notebooks: no outputs in git, and cells that run from top to bottom."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))


def cells(name, kind):
    content = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    return [cell for cell in content["cells"] if cell["cell_type"] == kind]


def code_of(name):
    """A program with the cells of a notebook, which use no commands of IPython's."""
    return "\n\n".join("".join(cell["source"]) for cell in cells(name, "code"))


def test_there_are_notebooks():
    assert NOTEBOOKS == ["first_fine_tune.ipynb", "many_adapters.ipynb"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_have_no_outputs_and_are_linked(name):
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells(name, "code"))
    compile(code_of(name), name, "exec")
    assert f"examples/{name}" in (FOLDER.parent / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_links_of_notebooks_lead_somewhere(name):
    text = "".join(line for cell in cells(name, "markdown") for line in cell["source"])
    links = [part.partition(")")[0] for part in text.split("](")[1:]]
    assert links and all((FOLDER / link).is_file() for link in links)


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_run(name, tmp_path):
    program = tmp_path / "notebook.py"
    program.write_text(code_of(name), encoding="utf-8")
    done = subprocess.run([sys.executable, program], cwd=FOLDER, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
