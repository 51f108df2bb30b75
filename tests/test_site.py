"""The documents as a site: it builds without a warning, quotes errors that exist, and documents all that is public."""

import ast
import re
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import sparse_peft
import sparse_peft.adapters

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
NO_NETWORK = (
    "import socket, sys\n"
    "def refuse(*_): raise OSError('the site is built without a network')\n"
    "socket.socket.connect = socket.getaddrinfo = refuse\n"
    "from mkdocs.__main__ import cli\n"
    "sys.exit(cli())\n"
)


def literals(path):
    """All texts of a source file, as they read at run time: neighbours joined, what is filled in as `…`."""

    def text(node):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return node.value
        if isinstance(node, ast.JoinedStr):
            return "".join(text(part) if isinstance(part, ast.Constant) else "…" for part in node.values)
        return ""

    return [found for node in ast.walk(ast.parse(path.read_text())) if (found := text(node))]


@pytest.fixture(scope="module")
def messages():
    return [message for path in (ROOT / "sparse_peft").rglob("*.py") for message in literals(path)]


def test_quoted_errors_occur_in_the_source(messages):
    quotes = re.findall(r"^> (.+)$", (DOCS / "troubleshooting.md").read_text(), flags=re.MULTILINE)
    assert len(quotes) > 25
    missing = [quote for quote in quotes if not any(quote in message for message in messages)]
    assert not missing


def test_all_that_is_public_is_documented():
    documented = set(re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(), flags=re.MULTILINE))
    public = {f"sparse_peft.{name}" for name in sparse_peft.__all__ if name != "__version__"}
    public |= {f"sparse_peft.adapters.{name}" for name in sparse_peft.adapters.__all__}
    assert documented == public | {"sparse_peft.report"}


def test_the_site_builds_without_a_warning_or_a_network(tmp_path):
    if find_spec("mkdocs") is None or find_spec("mkdocstrings") is None:
        pytest.skip("the extra `docs` is not installed")
    assert socket.socket  # the build below has none
    command = [sys.executable, "-c", NO_NETWORK, "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {path.stem for path in DOCS.glob("*.md")}
    assert pages <= {path.stem for path in (tmp_path / "site").glob("*.html")}
    api = (tmp_path / "site" / "api.html").read_text()
    assert "As many" in api or "as many entries as LoRA" in api
    for page in (tmp_path / "site").rglob("*.html"):
        fetched = re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"(https?://[^\"]+)", page.read_text())
        assert not [url for url in fetched if "canonical" not in url], page
