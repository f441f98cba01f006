"""What the house promises: nobody reaches into another module, arrows run downwards, the map names every file."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import file_map
import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("engine", "kernels", "recipes", "benchmarks", "tests")
FILES = sorted(path.relative_to(ROOT) for folder in PACKAGES for path in (ROOT / folder).rglob("*.py"))
MODULES = {
    ("" if path.parts[0] in ("benchmarks", "tests") else "silva.") + ".".join(path.with_suffix("").parts)
    for path in FILES
}


def imported(tree: ast.AST) -> set[str]:
    """The names that a file binds to modules of the project, and to what it takes out of them."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("silva", "benchmarks"):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {
                alias.asname or alias.name.split(".")[0]
                for alias in node.names
                if alias.name.split(".")[0] in ("silva", "benchmarks")
            }
    return found


def reaches_into(source: str) -> Iterator[tuple[int, str]]:
    """(line, what) of every assignment to an attribute of something that was imported from the project.

    Also through a local name for it (`patched: Any = module`), by setattr, and by deleting. `pytest.MonkeyPatch`, which
    undoes what it does, is a call of its own and not meant.
    """
    tree = ast.parse(source)
    ours = imported(tree)
    for node in ast.walk(tree):
        # another name for the same thing
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Name):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if node.value.id in ours:
                ours |= {target.id for target in targets if isinstance(target, ast.Name)}
    for node in ast.walk(tree):
        targets = []
        if isinstance(node, ast.Assign | ast.Delete):
            targets = node.targets
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setattr":
            targets = [ast.Attribute(node.args[0], "", ast.Store(), lineno=node.lineno, col_offset=0)]
        for target in targets:
            for each in target.elts if isinstance(target, ast.Tuple | ast.List) else [target]:
                root = each
                while isinstance(root, ast.Attribute):
                    root = root.value
                if isinstance(each, ast.Attribute) and isinstance(root, ast.Name) and root.id in ours:
                    yield node.lineno, ast.unparse(node)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_file_assigns_to_an_attribute_of_another_module(path):
    assert not [*reaches_into((ROOT / path).read_text())]


@pytest.mark.parametrize(
    "code",
    [
        "from silva.engine import x\nx.y = 1",
        "from silva.engine.x import Y\nY.z, other = 1, 2",
        "from silva.engine import x\npatched: Any = x\npatched.y.z = 1",
        "import silva.engine.x\nsilva.engine.x.y += 1",
        "from benchmarks import x\nsetattr(x, 'y', 1)",
        "from silva.engine import x\ndel x.y",
    ],
)
def test_reaching_in_is_found(code):
    assert [*reaches_into(code)]


@pytest.mark.parametrize(
    "code", ["import torch\ntorch.x = 1", "from silva.engine import x\ny = x.z\nself.x = x", "a.b = 1"]
)
def test_what_is_allowed_is_not(code):
    assert not [*reaches_into(code)]


# ---------------------------------------------------------------- arrows


def arrows() -> dict[str, set[str]]:
    """Module -> modules of the product that it imports, for type checking alone aside."""
    found: dict[str, set[str]] = {}
    for path in FILES:
        if path.parts[0] == "tests":
            continue
        name = ("" if path.parts[0] == "benchmarks" else "silva.") + ".".join(path.with_suffix("").parts)
        tree = ast.parse((ROOT / path).read_text())
        typing_only = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            for inner in ast.walk(node)
        }
        names: set[str] = set()
        for node in ast.walk(tree):
            if id(node) in typing_only:
                continue
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        found[name] = {each for each in names if each in MODULES and each != name}
    return found


def room(module: str) -> str:
    """The folder a module lies in, of `engine` the folder under it."""
    parts = module.removeprefix("silva.").split(".")
    return ".".join(parts[:2]) if parts[0] == "engine" else parts[0]


@pytest.mark.parametrize("of", [lambda module: module, room], ids=["modules", "rooms"])
def test_there_is_no_circle(of):
    below: dict[str, set[str]] = {}
    for module, others in arrows().items():
        below.setdefault(of(module), set()).update(of(other) for other in others if of(other) != of(module))
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way[way.index(name) :], name))
        if name not in done:
            for other in sorted(below.get(name, ())):
                visit(other, (*way, name))
            done.add(name)

    for name in sorted(below):
        visit(name, ())


def test_kernels_know_nothing_of_the_engine():
    for module, others in arrows().items():
        if module.startswith("silva.kernels"):
            assert all(other.startswith("silva.kernels") for other in others), module


# ---------------------------------------------------------------- the map


def test_the_map_names_every_file_in_one_line():
    """`make map` writes it."""
    page = file_map.PAGE.read_text()
    assert page.partition(file_map.BEGIN)[2] == file_map.made()
    assert all(len(line) < 280 for line in file_map.made().splitlines())
