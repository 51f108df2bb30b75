"""The documents as a site: it builds without a warning, quotes errors that exist, and documents all that is public."""

import ast
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import sparse_peft
import sparse_peft.adapters
import sparse_peft.calibrate
import sparse_peft.planning
import sparse_peft.procedures
import sparse_peft.sparsify
import sparse_peft.support

pytestmark = pytest.mark.subprocess

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


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of the site and mkdocs' messages, by the command of `make docs`, without a network."""
    if find_spec("mkdocs") is None or find_spec("mkdocstrings") is None:
        pytest.skip("the extra `docs` is not installed")
    (options,) = re.findall(
        r"^\t\$\(BIN\)/python -m mkdocs (.+)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE
    )
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-c", NO_NETWORK, *options.split(), "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    return folder, said


@pytest.fixture(scope="module")
def pages(built):
    return {path.relative_to(built[0]): path.read_text() for path in built[0].rglob("*.html")}


def test_the_site_builds_without_a_warning(built):
    assert "Documentation built" in built[1]
    assert not re.findall(r"^(?:WARNING|ERROR).*", built[1], flags=re.MULTILINE)


def test_every_document_is_a_page(pages):
    assert {path.relative_to(DOCS).with_suffix(".html") for path in DOCS.rglob("*.md")} <= pages.keys()


def test_pages_fetch_nothing_from_elsewhere(pages):
    for path, page in pages.items():
        fetched = re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"(https?://[^\"]+)", page)
        assert not [url for url in fetched if "canonical" not in url], path


@pytest.fixture(scope="module")
def documented(pages):
    return {anchor for page in pages.values() for anchor in re.findall(r" id=\"(sparse_peft[^\"]+)\"", page)}


@pytest.mark.parametrize(
    "module",
    [
        sparse_peft,
        sparse_peft.adapters,
        sparse_peft.calibrate,
        sparse_peft.planning,
        sparse_peft.procedures,
        sparse_peft.sparsify,
        sparse_peft.support,
    ],
    ids=lambda module: module.__name__,
)
def test_all_that_is_public_is_documented(module, documented):
    assert {f"{module.__name__}.{name}" for name in module.__all__ if name != "__version__"} <= documented


def test_references_of_docstrings_lead_somewhere(documented):
    """Also those of private objects, which have no page and which mkdocs does not see."""
    for path in (ROOT / "sparse_peft").rglob("*.py"):
        targets = set(re.findall(r"`\]\[(sparse_peft[^\]]*)\]", path.read_text()))
        assert targets <= documented, path


def test_no_role_of_sphinx_is_printed(pages):
    """mkdocstrings reads Markdown; a role of Sphinx would be printed as it is."""
    role = re.compile(r":(?:attr|class|const|data|exc|func|meth|mod|obj|ref):")
    assert not {str(path): found for path, page in pages.items() if (found := role.findall(page))}
    sources = [path for path in (ROOT / "sparse_peft").rglob("*.py") if role.search(path.read_text())]
    assert not sources


def test_the_landing_page_has_tabs_pictures_and_a_footer(pages):
    page = pages[Path("index.html")]
    tabs = re.search(r'class="tabbed-labels">(.*?)</div>', page, flags=re.DOTALL)
    assert tabs and re.findall(r"<label[^>]*>(.*?)</label>", tabs[1]) == ["CPU", "CUDA", "uv"]
    assert page.count("<img ") == 2 and "md-footer__link--next" in page
    assert all("md-footer__link" in pages[Path(name)] for name in ("cli.html", "api/configs.html"))


def test_no_page_links_to_a_repository_that_nobody_has_named(pages):
    assert not [path for path, page in pages.items() if "md-source" in page or 'rel="edit"' in page]


def test_code_wraps_and_outputs_scroll(built, pages):
    css = (built[0] / "stylesheets" / "code.css").read_text()
    assert "white-space: pre-wrap" in css and all("stylesheets/code.css" in page for page in pages.values())
    assert re.search(r'<div class="language-python[^>]*>.*?<pre>', pages[Path("index.html")], flags=re.DOTALL)
