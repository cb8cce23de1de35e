"""The families (methods, attacks, runtimes, devices): list, describe and build their members.

The file name is the registration: a member is one file with exactly one final class, a frozen dataclass whose
fields are its options. Listing and describing read the source and import nothing. A name is written with "-" where
the file has "_" (`data-free` is data_free.py); both spellings are understood.
"""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping

from edgeprune.errors import MissingDependency, UsageError
from edgeprune.quantities import suggest

FAMILIES = ("methods", "attacks", "runtimes", "devices")


def names(family: str) -> List[str]:
    """The members of a family, sorted."""
    return sorted(spelled(p.stem) for p in members_folder(family).glob("*.py") if not p.stem.startswith("_"))


def spelled(name: str) -> str:
    """The one spelling of a member's name, with "-"; a dotted path is left as it is."""
    return name if "." in name else name.replace("_", "-")


def path_of(family: str, name: str) -> Path:
    """The file of a member."""
    stem = name.replace("-", "_")
    path = members_folder(family) / f"{stem}.py"
    if spelled(stem) not in names(family):
        raise UsageError(f"no {family.rstrip('s')} is named {name!r}", suggest(name, names(family)))
    return path


def describe(family: str, name: str) -> str:
    """The first line of a member's docstring, without importing it."""
    text = ast.get_docstring(_tree(family, name)) or ""
    return text.splitlines()[0] if text else ""


def options(family: str, name: str) -> Dict[str, str]:
    """The options of a member (its dataclass fields) and their defaults as source text, without importing it."""
    for node in _tree(family, name).body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            fields = [n for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
            fields = [n for n in fields if "ClassVar" not in ast.unparse(n.annotation)]
            return {n.target.id: ast.unparse(n.value) if n.value else "" for n in fields}  # type: ignore[union-attr]
    return {}


def check_options(family: str, name: str, given: Mapping[str, Any]) -> None:
    """Refuse an option that the member does not have."""
    known = options(family, name)
    for key in given:
        if key not in known:
            raise UsageError(
                f"{spelled(name)} has no option {key!r}",
                suggest(key, known) or f"{spelled(name)} takes no options",
            )


def build(family: str, name: str, given: Mapping[str, Any]) -> Any:
    """Import a member and construct it with the given options. A dotted path names a class outside the package."""
    if "." in name:
        cls = _outside(family, name)
    else:
        check_options(family, name, given)
        cls = _final_class(family, name)
    try:
        return cls(**given)
    except TypeError as error:
        raise UsageError(f"{name}: {error}") from error


def importer(package: str, **homes: str) -> Callable[[str], Any]:
    """A package's `__getattr__` (PEP 562) that imports modules on first use. homes: module -> its names in one text."""
    home = {name: module for module, names in homes.items() for name in names.split()}

    def find(name: str) -> Any:
        if name in home:
            return getattr(import_module(f"{package}.{home[name]}"), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return find


def members_folder(family: str) -> Path:
    """The folder that holds the members of a family."""
    if family not in FAMILIES:
        raise UsageError(f"no family is named {family!r}", suggest(family, FAMILIES))
    return Path(__file__).resolve().parent / family


def _tree(family: str, name: str) -> ast.Module:
    return ast.parse(path_of(family, name).read_text(encoding="utf-8"))


def _import(module: str, what: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing == "edgeprune" or module.startswith(error.name or " "):
            raise UsageError(f"{what}: {error}") from error
        raise MissingDependency(f"{what} needs the package {missing}", f"pip install {missing}") from error
    except (ImportError, SyntaxError) as error:
        raise UsageError(f"{what} can't be imported: {error}") from error


def _final_class(family: str, name: str) -> Any:
    module = _import(f"edgeprune.{family}.{path_of(family, name).stem}", name)
    found = [
        v
        for k, v in vars(module).items()
        if isinstance(v, type) and v.__module__ == module.__name__ and k[0] != "_"
    ]
    if len(found) != 1:
        raise UsageError(f"{module.__name__} must define exactly one public class, found {len(found)}")
    return found[0]


def _outside(family: str, path: str) -> Any:
    if not all(part.isidentifier() for part in path.split(".")):
        raise UsageError(f"{path!r} is not a dotted path to a class", "write package.module.Class")
    module_name, _, class_name = path.rpartition(".")
    cls = getattr(_import(module_name, path), class_name, None)
    base = next(
        v
        for v in vars(import_module(f"edgeprune.{family}")).values()
        if isinstance(v, type) and v.__name__ + "s" == family.title()
    )
    if not isinstance(cls, type) or not issubclass(cls, base):
        raise UsageError(f"{path} is not a subclass of edgeprune.{family}.{base.__name__}")
    return cls
