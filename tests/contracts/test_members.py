"""What every member of every family keeps to; a new file in a family's folder is held to it without a new test."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from importlib import import_module
from pathlib import Path

import pytest

import edgeprune
from edgeprune import plugins
from edgeprune.attacks._base import STANDARD
from edgeprune.errors import MissingDependency

MEMBERS = [(family, name) for family in plugins.FAMILIES for name in plugins.names(family)]
PACKAGE = Path(edgeprune.__file__).parent


def tree(family: str, name: str) -> ast.Module:
    """The source of a member, parsed."""
    return ast.parse(plugins.path_of(family, name).read_text(encoding="utf-8"))


def member(family: str, name: str) -> type:
    """The class of a member, or the test is skipped where a package that it needs is not installed."""
    try:
        return type(plugins.build(family, name, {}))
    except MissingDependency as error:
        pytest.skip(error.message)


def base(family: str) -> type:
    """The abstract class of a family: Method for methods."""
    return getattr(import_module(f"edgeprune.{family}"), family.title().removesuffix("s"))


@pytest.mark.parametrize("family", plugins.FAMILIES)
def test_a_family_has_members_and_one_abstract_base(family: str) -> None:
    assert plugins.names(family)
    assert inspect.isabstract(base(family))


def test_the_members_that_this_version_promises_are_there() -> None:
    assert set(plugins.names("methods")) >= {"magnitude", "taylor", "uniform-random"}
    assert set(plugins.names("attacks")) == {"fgsm", "pgd", *STANDARD}
    assert "onnxruntime" in plugins.names("runtimes")
    assert set(plugins.names("devices")) >= {"local", "ssh", "adb", "fake"}


@pytest.mark.parametrize(("family", "name"), MEMBERS)
def test_a_member_is_described_in_one_line(family: str, name: str) -> None:
    line = plugins.describe(family, name)
    assert 10 <= len(line) <= 110
    assert line.endswith((".", ";", ":")), "the first line is a sentence"


@pytest.mark.parametrize(("family", "name"), MEMBERS)
def test_a_member_has_one_public_class_named_after_its_file(family: str, name: str) -> None:
    public = [
        n.name for n in tree(family, name).body if isinstance(n, ast.ClassDef) and not n.name.startswith("_")
    ]
    assert [p.lower() for p in public] == [name.replace("-", "")]


@pytest.mark.parametrize(("family", "name"), MEMBERS)
def test_a_member_imports_no_sibling_and_no_other_family(family: str, name: str) -> None:
    nodes = list(ast.walk(tree(family, name)))
    imported = {n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)}
    imported |= {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    for other in plugins.FAMILIES:
        members = {f"edgeprune.{other}.{n.replace('-', '_')}" for n in plugins.names(other)}
        assert not imported & members
        assert other == family or not any(f"{i}.".startswith(f"edgeprune.{other}.") for i in imported)


@pytest.mark.parametrize(("family", "name"), MEMBERS)
def test_a_member_is_a_frozen_dataclass_of_its_family_and_complete(family: str, name: str) -> None:
    cls = member(family, name)
    assert issubclass(cls, base(family))
    assert not inspect.isabstract(cls)
    assert dataclasses.is_dataclass(cls)
    assert cls.__dataclass_params__.frozen  # type: ignore[attr-defined]


@pytest.mark.parametrize(("family", "name"), MEMBERS)
def test_the_options_read_from_the_source_are_the_fields_with_their_defaults(family: str, name: str) -> None:
    cls = member(family, name)
    fields = {f.name: f.default for f in dataclasses.fields(cls) if f.init}
    read = plugins.options(family, name)
    assert set(read) == set(fields)
    for option, text in read.items():
        assert text, f"{option} needs a default: a member must work without options"
        if fields[option] is not dataclasses.MISSING:
            assert eval(text, vars(import_module(cls.__module__))) == fields[option]


@pytest.mark.parametrize(("family", "name"), MEMBERS)
def test_a_name_and_the_dotted_path_build_equal_members(family: str, name: str) -> None:
    cls = member(family, name)
    assert plugins.build(family, f"{cls.__module__}.{cls.__name__}", {}) == plugins.build(family, name, {})


LIGHT = ["errors", "records", "quantities", "serialization", "plugins", "recipe/schema", "recipe/parse"]


@pytest.mark.parametrize(
    "path",
    [PACKAGE / f"{name}.py" for name in LIGHT]
    + [
        path
        for name in ("agent", "host", "runtimes", "devices")
        for path in sorted((PACKAGE / name).rglob("*.py"))
    ],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_what_runs_on_a_device_keeps_to_python_3_8(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    parsed = ast.parse(text, feature_version=(3, 8))
    assert not any(isinstance(n, ast.Match) for n in ast.walk(parsed))
    first = [n for n in parsed.body if isinstance(n, ast.ImportFrom)][:1]
    assert path.name == "__init__.py" or not first or first[0].module == "__future__", (
        "annotations are not evaluated by 3.8"
    )


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_a_file_says_its_idea_in_its_first_line_and_stays_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert (ast.get_docstring(ast.parse(text)) or "").strip(), "the first line of a file is its idea"
    assert len(text.splitlines()) <= 500
