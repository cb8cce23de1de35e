"""Every name of TensorRT and of CUDA that the code uses is one that NVIDIA's bindings of 10.3, 10.13 and 11.4 have.

tests/support/tensorrt has the names of the classes that are used, read from the real bindings (the wheels
tensorrt-cu12-bindings), which can be imported, though not used, without TensorRT itself: three empty libraries with
the symbols that they look for are enough. Where the bindings and a C compiler are installed, the lists are held
against them.
"""

from __future__ import annotations

import ast
import ctypes.util
import importlib.metadata
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import paths
import pytest

from edgeprune.errors import DeviceError
from edgeprune.runtimes import tensorrt
from edgeprune.runtimes.engine import cuda as cuda_module

DATA = paths.SUPPORT / "tensorrt"
VERSIONS = sorted(path.stem for path in DATA.glob("*.json"))
SOURCES = (Path(tensorrt.__file__), Path(tensorrt.__file__))

# What each variable of the sources holds.
HOLDS = {
    "builder": "Builder", "network": "INetworkDefinition", "config": "IBuilderConfig", "parser": "OnnxParser",
    "error": "ParserError", "tensor": "ITensor", "profile": "IOptimizationProfile", "runtime": "Runtime",
    "engine": "ICudaEngine", "context": "IExecutionContext", "inspector": "EngineInspector", "learned": "ITimingCache",
    "layer": "ILayer",
}  # fmt: skip
# Module-level names that are no classes.
PLAIN = {"__version__"}


def api(version: str) -> dict[str, Any]:
    return json.loads((DATA / f"{version}.json").read_text())


def chains() -> set[tuple[str, ...]]:
    """Every dotted name of the sources: ("trt", "ILogger", "Severity", "ERROR")."""
    found = set()
    for node in (n for path in SOURCES for n in ast.walk(ast.parse(path.read_text(encoding="utf-8")))):
        parts: list[str] = []
        inner: ast.AST = node
        while isinstance(inner, ast.Attribute):
            parts.append(inner.attr)
            inner = inner.value
        if parts and isinstance(inner, ast.Name):
            found.add((inner.id, *reversed(parts)))
    return found


def missing(version: str) -> list[str]:
    """The dotted names that this version does not have."""
    names, wrong = api(version), []
    for first, *rest in chains():
        if first == "trt" and rest[0] not in PLAIN:
            kind = rest[0]
            inside = [*names["enums"].get(kind, []), *names["classes"].get(kind, [])]
            known = kind in names["enums"] or kind in names["classes"]
            member = len(rest) < 2 or rest[1] in (*inside, "__init__")
            severity = len(rest) < 3 or rest[2] in names["severity"]
            if not (known and member and severity):
                wrong.append(".".join(("trt", *rest)))
        if first in HOLDS and rest[0] not in names["classes"][HOLDS[first]]:
            wrong.append(f"{HOLDS[first]}.{rest[0]}")
    return sorted(set(wrong))


def test_there_are_three_versions_and_the_source_uses_many_names() -> None:
    assert VERSIONS == ["10.13.3.9", "10.3.0", "11.4.0.106"]
    used = {c[0] for c in chains()}
    assert set(HOLDS) <= used and "trt" in used
    assert len([c for c in chains() if c[0] == "trt"]) > 15


@pytest.mark.parametrize("version", VERSIONS)
def test_every_name_that_is_used_is_one_that_this_version_has(version: str) -> None:
    assert missing(version) == []


@pytest.mark.parametrize(
    ("gone", "version"),
    [("FP16", "11.4.0.106"), ("INT8", "11.4.0.106"), ("PREFER_PRECISION_CONSTRAINTS", "11.4.0.106")],
)
def test_the_lists_know_what_version_11_took_away(gone: str, version: str) -> None:
    assert gone not in api(version)["enums"]["BuilderFlag"]
    assert gone in api("10.3.0")["enums"]["BuilderFlag"]
    assert "EXPLICIT_BATCH" not in api(version)["enums"]["NetworkDefinitionCreationFlag"]


def test_a_name_that_is_not_there_would_be_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "x = trt.BuilderFlag.FP16\nengine.device_memory_size\ntrt.Nothing\ntrt.ILogger.Severity.LOUD\n"
    )
    monkeypatch.setattr(sys.modules[__name__], "SOURCES", (wrong,))
    assert missing("11.4.0.106") == [
        "ICudaEngine.device_memory_size", "trt.BuilderFlag.FP16", "trt.ILogger.Severity.LOUD", "trt.Nothing",
    ]  # fmt: skip


STUB = """
#define NONE(name) void* name(void) { return 0; }
#define ZERO(name) int name(void) { return 0; }
NONE(createInferBuilder_INTERNAL) NONE(createInferRefitter_INTERNAL) NONE(createInferRuntime_INTERNAL)
NONE(createNvOnnxParser_INTERNAL) NONE(createNvOnnxParserRefitter_INTERNAL) NONE(getBuilderPluginRegistry)
NONE(getPluginRegistry) NONE(getLogger) ZERO(initLibNvInferPlugins) ZERO(getNvOnnxParserVersion)
ZERO(getInferLibVersion) ZERO(getInferLibMajorVersion) ZERO(getInferLibMinorVersion)
ZERO(getInferLibPatchVersion) ZERO(getInferLibBuildVersion)
"""
# Loads the empty libraries and the bindings; writes their names, and makes what our code derives from them.
DUMP = """
import ctypes, json, sys
folder, major, wanted = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
for library in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
    ctypes.CDLL(f"{folder}/lib{library}.so.{major}", mode=ctypes.RTLD_GLOBAL)
import tensorrt_bindings as trt
from edgeprune.errors import DeviceError
from edgeprune.runtimes import tensorrt as agent_trt
log = []
logger = agent_trt.logger(trt, log)
agent_trt.profiler(trt, {})
try:
    agent_trt.started(lambda: trt.Builder(logger), log)
except DeviceError as error:
    said = error.message
found = {name: [a for a in dir(getattr(trt, name)) if not a.startswith("_")] for name in wanted["classes"]}
enums = {name: list(getattr(trt, name).__members__) for name in wanted["enums"]}
print(json.dumps({"version": trt.__version__, "classes": found, "enums": enums, "said": said}))
"""


def test_the_real_bindings_have_these_names(tmp_path: Path) -> None:
    compiler = shutil.which("gcc")
    if importlib.util.find_spec("tensorrt_bindings") is None or compiler is None:
        pytest.skip("needs a C compiler and one of the wheels tensorrt-cu12-bindings")
    version = importlib.metadata.version("tensorrt-cu12-bindings")
    if version not in VERSIONS:
        pytest.skip(f"there is no list of TensorRT {version}")
    (tmp_path / "stub.c").write_text(STUB)
    major = version.split(".", maxsplit=1)[0]
    for library in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
        name = f"lib{library}.so.{major}"
        command = [compiler, "-shared", "-fPIC", "-w", f"-Wl,-soname,{name}", "-o", name, "stub.c"]
        subprocess.run(command, cwd=tmp_path, check=True)
    wanted = api(version)
    command = [sys.executable, "-c", DUMP, str(tmp_path), major, json.dumps(wanted)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert {key: found[key] for key in ("version", "classes", "enums")} == {
        key: wanted[key] for key in ("version", "classes", "enums")
    }
    assert found["said"].startswith("TensorRT can't start")


def test_the_real_cuda_library_has_every_function_and_says_what_is_wrong() -> None:
    if not any(ctypes.util.find_library(name) for name in ("cudart",)):
        pytest.skip("needs CUDA's runtime library")
    cuda = cuda_module.load()
    major = int(cuda.version().split(".", maxsplit=1)[0])
    assert major >= 11
    try:
        assert cuda.in_use() <= cuda.memory()
    except DeviceError as error:
        assert error.message.startswith("cudaMemGetInfo failed with CUDA error ")
        assert not error.message.endswith("unknown")
