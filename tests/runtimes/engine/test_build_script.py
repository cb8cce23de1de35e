"""build_engine.sh gives each version of trtexec exactly the flags that it has, and fails in words."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from edgeprune import plugins, targets
from edgeprune.records import Artifact, InputSpec, Target

SH = shutil.which("sh")
pytestmark = pytest.mark.skipif(SH is None, reason="needs a POSIX shell")

# From samples/common/sampleOptions.cpp of NVIDIA/TensorRT at the tags of VERSIONS: flags that all of them have,
# and flags with the first release that has them and the first that has them no more.
ALWAYS = """
    onnx saveEngine loadEngine timingCacheFile profilingVerbosity sparsity minShapes optShapes maxShapes shapes
    noDataTransfers useCudaGraph useSpinWait separateProfileRun warmUp duration iterations avgRuns sleepTime
    idleTime streams percentile exportTimes exportProfile exportLayerInfo
"""
BETWEEN = {
    "workspace": (802, 1000),
    "buildOnly": (802, 1000),
    "memPoolSize": (804, 9999),
    "skipInference": (806, 9999),
    "builderOptimizationLevel": (806, 9999),
    "infStreams": (806, 9999),
    "stronglyTyped": (1000, 9999),
    "fp16": (802, 1100),
    "int8": (802, 1100),
    "includeDataTransfers": (1100, 9999),
    "noCudaGraph": (1100, 9999),
    "noSpinWait": (1100, 9999),
}
# What trtexec calls itself, and major * 100 + minor.
VERSIONS = {
    "v8201": 802,
    "v8401": 804,
    "v8502": 805,
    "v8601": 806,
    "v100300": 1003,
    "v101303": 1013,
    "v110100": 1101,
}

FAKE = """#!{python} -IS
import json, pathlib, sys
here = pathlib.Path(__file__).parent
code, accepted = json.loads((here / "version.json").read_text())
print("&&&& RUNNING TensorRT.trtexec [TensorRT " + code + "] # trtexec")
if sys.argv[1:] == ["--help"]:
    sys.exit(0)
with open(here / "calls.jsonl", "a") as file:
    print(json.dumps(sys.argv[1:]), file=file)
given = dict((a[2:] + "=").split("=", 1) for a in sys.argv[1:])
unknown = set(given) - set(accepted)
if unknown or (here / "broken").exists():
    print("Unknown option: ", unknown)
    sys.exit(1)
if "saveEngine" in given:
    pathlib.Path(given["saveEngine"][:-1]).write_text("engine")
print("[I] GPU Compute Time: min = 1 ms, max = 2 ms, mean = 1.5 ms, median = 1.5 ms")
"""


@dataclass(frozen=True)
class Board:
    """A folder with the script and a fake trtexec of one version on PATH."""

    folder: Path
    tools: Path

    def call(self, *arguments: str, path: str = "") -> subprocess.CompletedProcess[str]:
        script = str(self.folder / "build_engine.sh")
        environment = {"PATH": path or f"{self.tools}{os.pathsep}{os.defpath}"}
        command = [str(SH), script, *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    def becomes(self, code: str) -> None:
        (self.tools / "version.json").write_text(json.dumps([code, accepted(VERSIONS.get(code, 0))]))

    def calls(self) -> list[list[str]]:
        file = self.tools / "calls.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def accepted(version: int) -> list[str]:
    return [*ALWAYS.split(), *(flag for flag, (first, gone) in BETWEEN.items() if first <= version < gone)]


def script(target: Target, precision: str = "fp32", *, dynamic_batch: bool = False) -> str:
    spec = InputSpec((3, 32, 48), 10)
    artifact = Artifact("runs/some run/model.onnx", "onnx", precision, spec, "", 0, opset=target.opset)
    return plugins.build("runtimes", "tensorrt", {}).engine_script(
        target, artifact, dynamic_batch=dynamic_batch
    )


def board(tmp_path: Path, code: str, text: str) -> Board:
    folder, tools = tmp_path / "it's a run $HOME", tmp_path / "tools"
    folder.mkdir()
    tools.mkdir()
    (folder / "model.onnx").write_bytes(b"")
    (folder / "build_engine.sh").write_text(text)
    (tools / "trtexec").write_text(FAKE.format(python=sys.executable))
    (tools / "trtexec").chmod(0o755)
    here = Board(folder, tools)
    here.becomes(code)
    return here


@pytest.fixture(scope="module")
def orin() -> Target:
    return targets.target("jetson-orin-nano")


@pytest.mark.parametrize(
    "name", [n for n in targets.names("targets") if targets.target(n).runtime == "tensorrt"]
)
def test_the_script_of_every_jetson_is_valid_shell_and_names_its_board(name: str, tmp_path: Path) -> None:
    target = targets.target(name)
    for dynamic_batch in (False, True):
        file = tmp_path / "build_engine.sh"
        file.write_text(script(target, dynamic_batch=dynamic_batch))
        done = subprocess.run([str(SH), "-n", str(file)], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert target.title in file.read_text() and "@" not in file.read_text().replace('"$@"', "")


@pytest.mark.parametrize("code", VERSIONS)
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_every_version_gets_only_flags_that_it_has(
    code: str, precision: str, orin: Target, tmp_path: Path
) -> None:
    here = board(tmp_path, code, script(orin, precision, dynamic_batch=True))
    done = here.call()
    assert done.returncode == 0, done.stderr
    assert len(here.calls()) == 2
    assert (here.folder / "model.engine").read_text() == "engine"
    assert "median = 1.5 ms" in done.stdout


def test_only_a_file_with_the_pattern_is_built_with_sparse_kernels(orin: Target) -> None:
    for sparse, word in ((True, "enable"), (False, "disable")):
        made = Artifact("model.onnx", "onnx", "fp16", InputSpec((3, 32, 48), 10), "", 0, opset=orin.opset)
        text = plugins.build("runtimes", "tensorrt", {}).engine_script(
            orin, made, dynamic_batch=False, sparse=sparse
        )
        assert f"--sparsity={word}" in text


def build_flags(stem: str, code: str) -> list[str]:
    pool = "--workspace=1907" if VERSIONS[code] < 804 else "--memPoolSize=workspace:1907"
    old = VERSIONS[code] < 806
    return [
        f"--onnx={stem}.onnx",
        f"--saveEngine={stem}.engine",
        f"--timingCacheFile={stem}.timing.cache",
        "--profilingVerbosity=detailed",
        "--sparsity=disable",
        pool,
        *(["--buildOnly"] if old else ["--builderOptimizationLevel=3", "--skipInference"]),
        *(["--stronglyTyped"] if 1000 <= VERSIONS[code] < 1100 else []),
    ]


def time_flags(stem: str, code: str) -> list[str]:
    return [
        f"--loadEngine={stem}.engine",
        "--noDataTransfers",
        "--useCudaGraph",
        "--useSpinWait",
        "--warmUp=1000",
        "--duration=10",
        "--iterations=200",
        "--avgRuns=100",
        "--sleepTime=0",
        "--idleTime=0",
        "--streams=1" if VERSIONS[code] < 806 else "--infStreams=1",
        "--percentile=99" if VERSIONS[code] < 805 else "--percentile=50,90,99",
        *(["--separateProfileRun"] if VERSIONS[code] < 1100 else []),
        "--profilingVerbosity=detailed",
        f"--exportTimes={stem}.times.json",
        f"--exportProfile={stem}.profile.json",
        f"--exportLayerInfo={stem}.layers.json",
    ]


@pytest.mark.parametrize("code", VERSIONS)
def test_the_flags_are_exactly_these(code: str, orin: Target, tmp_path: Path) -> None:
    here = board(tmp_path, code, script(orin))
    assert here.call().returncode == 0
    stem = str(here.folder / "model")
    assert here.calls() == [build_flags(stem, code), time_flags(stem, code)]


def test_tensorrt_10_and_11_are_told_the_same_about_what_to_time(orin: Target, tmp_path: Path) -> None:
    """Version 11 always times layers in a run of their own, 10 does when told; all else is said to both alike."""
    here = board(tmp_path, "v100300", script(orin))
    assert here.call().returncode == 0
    here.becomes("v110100")
    assert here.call().returncode == 0
    _, on_10, _, on_11 = here.calls()
    assert [flag for flag in on_10 if flag != "--separateProfileRun"] == on_11


@pytest.mark.parametrize(("code", "flag"), [("v8201", "--fp16"), ("v100300", "--stronglyTyped")])
def test_the_precision_comes_from_the_file(code: str, flag: str, orin: Target, tmp_path: Path) -> None:
    here = board(tmp_path, code, script(orin, "fp16"))
    assert here.call().returncode == 0
    build = here.calls()[0]
    assert flag in build
    assert ("--fp16" in build) == (VERSIONS[code] < 1000)


def test_an_open_batch_is_built_and_timed_for_one_image(orin: Target, tmp_path: Path) -> None:
    here = board(tmp_path, "v100300", script(orin, dynamic_batch=True))
    assert here.call().returncode == 0
    build, timed = here.calls()
    shape = "input:1x3x32x48"
    assert {f"--minShapes={shape}", f"--optShapes={shape}", f"--maxShapes={shape}"} <= set(build)
    assert f"--shapes={shape}" in timed


def test_another_file_can_be_timed_with_the_same_script(orin: Target, tmp_path: Path) -> None:
    here = board(tmp_path, "v100300", script(orin))
    other = tmp_path / "dense.onnx"
    other.write_bytes(b"")
    assert here.call(str(other)).returncode == 0
    assert here.calls()[0][0] == f"--onnx={other}"
    assert (tmp_path / "dense.engine").exists()


def test_another_tensorrt_than_the_board_should_have_is_noted(orin: Target, tmp_path: Path) -> None:
    here = board(tmp_path, "v110100", script(orin))
    assert "TensorRT 10.3 was expected (JetPack 6.2)" in here.call().stdout
    here.becomes("v100300")
    assert "was expected" not in here.call().stdout


@pytest.mark.parametrize(
    ("code", "arguments", "status", "words"),
    [
        ("v8001", (), 3, "TensorRT 8.0 is too old"),
        ("unknown", (), 3, "does not tell its version"),
        ("v100300", ("no.onnx",), 2, "no file 'no.onnx'"),
        ("v100300", ("model.pt",), 2, "'model.pt' is not an .onnx file"),
        ("v100300", ("a.onnx", "b.onnx"), 2, "one ONNX file at a time, got 2"),
    ],
)
def test_what_can_not_work_is_refused_in_words(
    code: str, arguments: tuple[str, ...], status: int, words: str, orin: Target, tmp_path: Path
) -> None:
    here = board(tmp_path, code, script(orin))
    done = here.call(*arguments)
    assert (done.returncode, here.calls()) == (status, [])
    assert words in done.stderr


def test_a_missing_trtexec_says_the_package_that_has_it(orin: Target, tmp_path: Path) -> None:
    if Path("/usr/src/tensorrt/bin/trtexec").exists():
        pytest.skip("this machine has TensorRT")
    here = board(tmp_path, "v100300", script(orin))
    done = here.call(path=os.defpath)
    assert done.returncode == 3
    assert "sudo apt install libnvinfer-bin" in done.stderr


def test_a_failing_trtexec_shows_its_last_words(orin: Target, tmp_path: Path) -> None:
    here = board(tmp_path, "v100300", script(orin))
    (here.tools / "broken").write_text("")
    done = here.call()
    assert done.returncode == 6
    assert "Unknown option" in done.stderr and "model.build.log" in done.stderr
    assert len(here.calls()) == 1


def test_the_workspace_is_a_quarter_of_the_boards_memory(orin: Target) -> None:
    assert "workspace=1907 " in script(orin)
    assert "workspace=3814 " in script(replace(orin, memory_bytes=16 * 10**9))
    assert "workspace=64 " in script(replace(orin, memory_bytes=10**6))
