"""The import graph: layers in one order, no circle, methods that know nothing of one another, imports at the top."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = "sparse_peft"
ROOT = Path(__file__).parents[1] / PACKAGE

# Each may import those before it; the package itself only collects names.
LAYERS = (
    "version",
    "compat",
    "other_names",
    "constraints",
    "staging",
    "numerics",
    "support",
    "ops",
    "calibrate",
    "sparsify",
    "dynamics",
    "tuners",
    "registry",
    "structure",
    "procedures",
    "training",
    "adapters",
    "sync",
    "serving",
    "planning",
    "report",
    "doctor",
    "integrations",
    PACKAGE,
    "cli",
)
# A method, and the one it inherits from.
INHERITANCE = {"sltrain": "sparse"}
# Packages that not every installation has, and a private module that not every version of torch has.
OPTIONAL = {"bitsandbytes", "lm_eval", "matplotlib", "starlette", "triton", "torch.cuda._utils", "uvicorn"}


class Import(NamedTuple):
    """One module's import of another. ``late``: when a function is called; ``typing``: for type checkers only."""

    importer: str
    imported: str
    line: int
    late: bool
    typing: bool


@cache
def sources() -> dict[str, Path]:
    """``{module: file}`` of the package."""
    names = {path: path.relative_to(ROOT.parent).with_suffix("").parts for path in ROOT.rglob("*.py")}
    return {".".join(parts[:-1] if parts[-1] == "__init__" else parts): path for path, parts in names.items()}


@cache
def imports() -> list[Import]:
    return [found for module in sources() for found in _imports_of(module)]


def _imports_of(module: str) -> Iterator[Import]:
    todo: list[tuple[ast.AST, bool, bool]] = [(ast.parse(sources()[module].read_text()), False, False)]
    while todo:
        node, late, typing = todo.pop()
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from (Import(module, name, node.lineno, late, typing) for name in _targets(module, node))
        late |= isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        typing |= isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        todo += [(child, late, typing) for child in ast.iter_child_nodes(node)]


def _targets(module: str, node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    base = node.module or ""
    if node.level:
        package = module.split(".") if sources()[module].name == "__init__.py" else module.split(".")[:-1]
        base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
    for alias in node.names:
        yield name if (name := f"{base}.{alias.name}") in sources() else base


def own() -> list[Import]:
    """Imports of the package's own modules."""
    return [found for found in imports() if found.imported in sources()]


def layer_of(module: str) -> str:
    return module.split(".")[1] if "." in module else PACKAGE


def method_of(module: str) -> str | None:
    parts = module.split(".")
    is_method = parts[1:2] == ["tuners"] and len(parts) > 2 and f"{PACKAGE}.tuners.{parts[2]}.config" in sources()
    return parts[2] if is_method else None


def refuse(found: list[Import]) -> None:
    assert not found, "\n".join(f"{i.importer}, line {i.line}, imports {i.imported}" for i in found)


def test_every_module_has_a_layer():
    assert {layer_of(module) for module in sources()} == set(LAYERS)


def test_a_layer_imports_only_those_below_it():
    height = {layer: number for number, layer in enumerate(LAYERS)}
    refuse([found for found in own() if height[layer_of(found.imported)] > height[layer_of(found.importer)]])


def test_no_module_imports_itself_by_way_of_others():
    graph = defaultdict(set)
    for found in own():
        if not found.typing:
            graph[found.importer].add(found.imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


def test_a_methods_folder_is_imported_by_its_heirs_alone():
    def is_allowed(found: Import) -> bool:
        importer, imported = method_of(found.importer), method_of(found.imported)
        return imported is None or importer == imported or (importer and INHERITANCE.get(importer) == imported)

    refuse([found for found in own() if not is_allowed(found)])


def test_only_optional_packages_are_imported_late():
    def is_optional(name: str) -> bool:
        return name in OPTIONAL or name.split(".")[0] in OPTIONAL

    refuse([found for found in imports() if found.late and not is_optional(found.imported)])
