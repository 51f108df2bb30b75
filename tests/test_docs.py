"""Every Python block of the documents runs, in order, with small models in place of those on the hub."""

import re
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers.versions import transformers_adapters

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]  # docs/api/ is made from docstrings
MARKS = {"ecosystem.md": transformers_adapters}


def python_blocks(path):
    return re.findall(r"^```python\n(.*?)^```", path.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=MARKS.get(path.name, ()), id=path.name) for path in DOCUMENTS]
)
def test_blocks_run(path, stand_in, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("trl")
    for cls in (AutoModelForCausalLM, AutoTokenizer):
        original = cls.from_pretrained.__func__

        def from_pretrained(cls, name, *args, original=original, **kwargs):
            assert re.fullmatch(r"[\w-]+/[\w.-]+", str(name)), f"{name} is no hub name"
            return original(cls, stand_in, *args, **kwargs)

        monkeypatch.setattr(cls, "from_pretrained", classmethod(from_pretrained))
    monkeypatch.chdir(tmp_path)
    blocks = python_blocks(path)
    assert blocks
    namespace = {"__name__": path.stem}
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"{path.name}, block {number}", "exec"), namespace)


def test_links_lead_somewhere():
    for path in [*DOCUMENTS, ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path.name}: {target}"
