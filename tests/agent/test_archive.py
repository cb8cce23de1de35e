"""The device half as one file: always the same bytes, complete, and run by a bare Python, also an old one."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from edgeprune.agent import archive
from edgeprune.agent.archive import sources

ABOUT = json.dumps({"op": "about", "runtime": "onnxruntime"})
# What is light enough to travel: nothing that needs torch, and nothing of the host's work.
LIGHT = {
    "__init__", "agent", "confidence", "errors", "host", "plugins", "quantities", "records", "runtimes",
    "serialization", "version",
}  # fmt: skip
# What came with 3.9 or later, and would only fail when it runs there.
NEW_MODULES = {"tomllib", "graphlib", "zoneinfo"}
NEW_METHODS = {
    "removeprefix",
    "removesuffix",
    "is_relative_to",
    "readlink",
    "hardlink_to",
    "with_stem",
    "bit_count",
}


@pytest.fixture(scope="module")
def pyz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "edgeprune.pyz"
    path.write_bytes(archive.pyz())
    return path


def test_the_same_sources_give_the_same_bytes(pyz: Path) -> None:
    assert archive.pyz() == pyz.read_bytes()
    code = (
        "import sys; from edgeprune.agent import archive as packing; sys.stdout.buffer.write(packing.pyz())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout == pyz.read_bytes()


def test_only_light_files_travel(pyz: Path) -> None:
    names = zipfile.ZipFile(pyz).namelist()
    assert names[0] == "__main__.py"
    assert {"edgeprune/agent/program.py", "edgeprune/runtimes/onnxruntime.py"} <= set(names)
    parts = {name.removesuffix(".py").split("/")[1] for name in names[1:]}
    assert {p for p in parts if not p.startswith("agent")} <= LIGHT
    assert pyz.stat().st_size < 100_000


def pythons() -> list[str]:
    """This Python, and those on the path that a device may have."""
    old = Path.home() / ".pyenv" / "versions"
    found = [*(shutil.which(f"python3.{minor}") for minor in range(8, 11)), *old.glob("3.[89].*/bin/python3")]
    works = [
        str(p)
        for p in found
        if p and subprocess.run([p, "-V"], capture_output=True, check=False).returncode == 0
    ]
    return [sys.executable, *sorted(set(works))]


@pytest.mark.parametrize("python", pythons())
def test_a_bare_python_runs_it(pyz: Path, python: str) -> None:
    """-S and -E: without site-packages; so it says what is missing, and that in its own words."""
    bare = [python, "-S", "-E", str(pyz)]
    done = subprocess.run(bare, input=ABOUT, capture_output=True, text=True, timeout=60, check=False)
    said = json.loads(done.stdout)
    assert (done.returncode, said["kind"], said["hint"]) == (
        3,
        "MissingDependency",
        "pip install onnxruntime",
    )
    done = subprocess.run(bare, input="{}", capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "no operation None" in json.loads(done.stdout)["error"]


@pytest.mark.parametrize("python", pythons())
def test_it_travels_as_a_line_of_input(python: str) -> None:
    command = [python, "-S", "-E", "-c", archive.START]
    text = archive.line() + ABOUT
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, json.loads(done.stdout)["kind"]) == (3, "MissingDependency"), done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize("proc", [True, False])
def test_it_travels_to_a_system_without_files_in_memory(tmp_path: Path, proc: bool) -> None:
    start = archive.START if proc else archive.START.replace("/proc/", "/no-proc/")
    code = f"import os; del os.memfd_create\n{start}"
    done = subprocess.run(
        [sys.executable, "-c", code], input=archive.line() + ABOUT, capture_output=True, text=True, timeout=60,
        env={"TMPDIR": str(tmp_path)}, check=False,
    )  # fmt: skip
    assert json.loads(done.stdout)["runtime"].startswith("onnxruntime"), done.stderr
    assert not list(tmp_path.iterdir())


def test_a_system_without_files_in_memory_keeps_nothing_of_one_that_was_killed(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", f"import os; del os.memfd_create\n{archive.START}"], stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={"TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert process.stdin is not None and process.stderr is not None
    process.stdin.write(archive.line().encode())
    process.stdin.flush()
    try:  # the agent runs, and waits for its request, once it has the .pyz open
        until = time.monotonic() + 60
        while (
            not any(tmp_path.iterdir()) and not nameless(process.pid, tmp_path) and time.monotonic() < until
        ):
            time.sleep(0.02)
    finally:
        process.kill()
        process.communicate()
    assert not list(tmp_path.iterdir())


def nameless(pid: int, folder: Path) -> bool:
    """Whether a process has a file of a folder open that has no name there any more."""
    found = []
    for link in Path(f"/proc/{pid}/fd").glob("*"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(link))
    return any(name.startswith(str(folder)) and name.endswith("(deleted)") for name in found)


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.stem)
def test_what_travels_is_python_3_8(path: Path) -> None:
    """Also in what only fails when it runs: new modules and methods, and types that are evaluated."""
    tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 8))
    nodes = list(ast.walk(tree))
    assert not any(isinstance(n, ast.Match) for n in nodes)
    imported = {a.name.split(".")[0] for n in nodes if isinstance(n, ast.Import) for a in n.names}
    imported |= {(n.module or "").split(".")[0] for n in nodes if isinstance(n, ast.ImportFrom)}
    assert not imported & NEW_MODULES
    assert not {n.attr for n in nodes if isinstance(n, ast.Attribute)} & NEW_METHODS
    assert not {k.arg for n in nodes if isinstance(n, ast.Call) for k in n.keywords} & {
        "strict",
        "slots",
        "kw_only",
    }
    for node in evaluated(tree):
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
            assert node.value.id not in ("list", "dict", "tuple", "set", "type", "frozenset"), (
                f"line {node.lineno}"
            )
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            for side in (node.left, node.right):
                assert not (isinstance(side, ast.Constant) and side.value is None), f"line {node.lineno}"


def evaluated(tree: ast.AST) -> list[ast.AST]:
    """Every node but annotations, which `from __future__ import annotations` keeps as text."""
    found: list[ast.AST] = []
    for name, value in ast.iter_fields(tree):
        if name in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                found += [child, *evaluated(child)]
    return found


def test_the_check_of_types_would_notice_new_ones() -> None:
    nodes = evaluated(ast.parse("A = list[int]\ndef f(x: list[int]) -> dict[str, int]: ...\n"))
    assert sum(isinstance(n, ast.Subscript) for n in nodes) == 1


def test_the_pyz_is_a_zip_file_that_unpacks_to_the_sources(pyz: Path) -> None:
    archive = zipfile.ZipFile(io.BytesIO(pyz.read_bytes()))
    for path in sources():
        name = path.relative_to(
            path.parents[[p.name for p in path.parents].index("edgeprune") + 1]
        ).as_posix()
        assert archive.read(name) == path.read_bytes()
