"""Tests go through what a module shows: none names a private function, class or attribute of the project."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import ROOT

TESTS = ROOT / "tests"


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def named(source: str) -> Iterator[tuple[int, str]]:
    """(line, private name of edgeprune) of each import, attribute and monkeypatch; modules may be private."""
    tree = ast.parse(source)
    imports = [n for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom)) and is_ours(n)]
    names = {(a.asname or a.name).split(".")[0] for node in imports for a in node.names}
    for node in imports:
        folder = ROOT / str(getattr(node, "module", "")).replace(".", "/")
        for alias in node.names:
            if (
                private(alias.name)
                and not (folder / alias.name).is_dir()
                and not (folder / f"{alias.name}.py").is_file()
            ):
                yield node.lineno, alias.name
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and private(node.attr) and root_of(node) in names:
            yield node.lineno, ast.unparse(node)
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "setattr"
        ):
            texts = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            yield from ((node.lineno, text) for text in texts if private(text.rpartition(".")[2]))


def is_ours(node: ast.Import | ast.ImportFrom) -> bool:
    modules = (
        [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
    )
    return any(module.split(".")[0] == "edgeprune" for module in modules)


def root_of(node: ast.expr) -> str:
    while isinstance(node, (ast.Attribute, ast.Call)):
        node = node.value if isinstance(node, ast.Attribute) else node.func
    return node.id if isinstance(node, ast.Name) else ""


@pytest.mark.parametrize("file", sorted(TESTS.rglob("*.py")), ids=lambda f: str(f.relative_to(TESTS)))
def test_a_test_names_nothing_private(file: Path) -> None:
    found = [f"{file}:{line} {name}" for line, name in named(file.read_text())]
    assert not found, "test it through the module's public functions, or make it public: " + "; ".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "from edgeprune.gate import verdict\nverdict._margin(1)",
        "from edgeprune.methods.dnr import DNR\nDNR()._draw()",
        "from edgeprune.safe_loading.pt2_graph import _check",
        "import edgeprune\nmonkeypatch.setattr(edgeprune, '_hidden', 1)",
    ],
)
def test_private_names_are_found(source: str) -> None:
    assert len(list(named(source))) == 1


def test_public_names_and_private_modules_are_not() -> None:
    source = "from edgeprune.methods import _base\n_base.need_images(None, '')\nimport torch\ntorch._C"
    assert not list(named(source))
