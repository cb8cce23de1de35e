"""The device half as one .pyz: the agent, the runtimes and what they import, zipped, the same bytes every time."""

from __future__ import annotations

import ast
import base64
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]

_MAIN = "import sys\n\nfrom edgeprune.agent.program import main\n\nsys.exit(main())\n"

# Zip files know no earlier time. With it, and in one order, the same sources give the same bytes.
_EPOCH = (1980, 1, 1, 0, 0, 0)
# Started as `python3 -c START`: the .pyz comes as the first line of the input, so that nothing is installed and, where
# there is /proc, nothing is left over even when the process is killed. Kept to what any Python 3 reads, to
# say that one is too old. The current folder is taken off the path: somebody's numpy.py may lie there.
START = r"""
import base64, json, os, runpy, sys, tempfile
if sys.version_info < (3, 8):
    found = ".".join(str(v) for v in sys.version_info[:3])
    print(json.dumps({"kind": "MissingDependency", "error": "Python 3.8 or newer is needed, %s is Python %s"
                      % (sys.executable, found), "hint": "name a newer one: --device 'URL?python=/path/to/python3'"}))
    sys.exit(3)
sys.path[:] = [p for p in sys.path if p]
pyz = base64.b64decode(sys.stdin.readline())

def placed(path):
    with open(path, "wb") as file:
        file.write(pyz)
    return path


try:
    path = placed("/proc/self/fd/%d" % os.memfd_create("edgeprune.pyz"))
except (AttributeError, OSError):  # no files in memory: one without a name, which ends with the process too
    try:
        nameless = tempfile.TemporaryFile()
        path = placed("/proc/self/fd/%d" % nameless.fileno())
    except OSError:  # no /proc
        folder = tempfile.TemporaryDirectory(prefix="edgeprune-")
        path = placed(os.path.join(folder.name, "edgeprune.pyz"))
runpy.run_path(path, run_name="__main__")
"""


def pyz() -> bytes:
    """The program: `python3 edgeprune.pyz` reads one request on stdin, as `edgeprune.agent` says."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        _add(archive, "__main__.py", _MAIN)
        for path in sources():
            name = path.relative_to(_PACKAGE.parent).as_posix()
            _add(archive, name, path.read_text(encoding="utf-8"))
    return out.getvalue()


def line() -> str:
    """The program as the line of input that `START` takes first."""
    return base64.b64encode(pyz()).decode() + "\n"


def sources() -> tuple[Path, ...]:
    """The files that go with it, sorted: the agent, the runtimes, and what these import of this package."""
    found: set[Path] = set()
    waiting = [_PACKAGE / "agent" / "program.py", *_PACKAGE.glob("runtimes/*.py")]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += _imported(path)
    return tuple(sorted(found))


def _imported(path: Path) -> list[Path]:
    names = {"edgeprune"}
    for node in _run(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return [file for name in names if name.partition(".")[0] == "edgeprune" for file in _files(name)]


def _run(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield node
            yield from _run(node)


def _files(module: str) -> list[Path]:
    """The files that an import of a module runs; none for a name that is not a module."""
    stem = _PACKAGE.parent.joinpath(*module.split("."))
    options = (stem.with_suffix(".py"), stem / "__init__.py")
    return [path for path in options if path.is_file()]


def _add(archive: zipfile.ZipFile, name: str, text: str) -> None:
    info = zipfile.ZipInfo(name, _EPOCH)
    info.compress_type = zipfile.ZIP_DEFLATED
    info.external_attr = 0o644 << 16
    archive.writestr(info, text)
