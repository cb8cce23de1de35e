"""doctor: it never crashes, says what is missing, and gives the line that helps."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from onnx_files import Scripted

from edgeprune.devices import _base
from edgeprune.devices.transport.stream import Answer
from edgeprune.diagnose import environment
from edgeprune.diagnose.device import Finding
from edgeprune.errors import DeviceError, UsageError
from edgeprune.records import Target

ORIN = Target(
    "orin", "Some Jetson", "ssh", "tensorrt", ("fp32", "fp16"), {"fp32": 8}, 8 * 10**9, 1.0, {}, 20, {}
)
LOCAL = replace(ORIN, name="local", title="this machine", runtime="onnxruntime", precisions=("fp32", "int8"))


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small packages in place of the large ones, whose import takes seconds."""
    monkeypatch.setattr(
        environment, "REQUIRED", (("pytest", "pytest", "tests"), ("no-such-package", "nothing", "nothing"))
    )
    monkeypatch.setattr(
        environment, "OPTIONAL", (("no-such-extra", "nothing", "a few models"), ("tensorrt", "", "engines"))
    )
    monkeypatch.setattr(environment.shutil, "which", lambda name: None)


def by_name(findings: Any) -> dict[str, Finding]:
    return {f.name: f for f in findings}


def test_each_package_is_ok_or_comes_with_the_line_that_installs_it() -> None:
    found = by_name(environment.check_environment(None, "fake"))
    assert found["python"].status == "ok"
    assert found["pytest"] == Finding("pytest", "ok", f"{metadata.version('pytest')}; tests")
    assert found["no-such-package"] == Finding(
        "no-such-package", "missing", "not installed; nothing", "pip install --upgrade no-such-package"
    )
    assert found["no-such-extra"].status == "optional"


def test_a_device_that_answers_is_described() -> None:
    found = by_name(environment.check_environment(None, "fake"))
    assert found["device fake"] == Finding("device fake", "ok", "Python 3.8.0, canned 0.0, 4 cores to use")
    assert found["fake cpu"].found == "Canned board, Canned core, aarch64, Linux, 4 cores"
    assert found["fake memory"].found == "4.1 GB"
    assert found["fake temperature"].found == "45 °C"
    assert {found[f"fake {k}"].status for k in ("governor", "load", "vectors")} == {"ok"}


def test_this_machine_is_looked_at_without_a_crash() -> None:
    found = by_name(environment.check_environment(LOCAL, "local"))
    assert found["device local"].status == "ok"
    assert "onnxruntime" in found["device local"].found
    assert found["target local"].found == "this machine, onnxruntime: fp32, int8"


def test_an_unknown_device_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="accepted are local"):
        environment.check_environment(None, "ftp://somewhere")


def scripted(
    monkeypatch: pytest.MonkeyPatch, facts: str, agent: Answer | None = None, name: str = "scripted"
) -> None:
    @dataclass(frozen=True)
    class Told(Scripted):
        @property
        def name(self) -> str:
            return name

        def run(self, argv: Any, stdin: str, timeout_s: float) -> Answer:
            return self.answer if argv == self.agent() else Answer(0, facts, "")

    whole = _base.device_from_url
    told = Told(agent or Answer(0, '{"python": "3.8.1", "runtime": "r 1", "cores": 2}', ""))
    monkeypatch.setattr(
        environment, "device_from_url", lambda url, setup=None: told if url == "told" else whole(url)
    )


def test_a_busy_machine_with_a_saving_governor_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, "cores=2\nload=1.50 1 1\ngovernor=powersave\nflags=sse\n")
    found = by_name(environment.check_environment(None, "told"))
    assert found["scripted load"].status == "warning"
    assert found["scripted governor"] == Finding(
        "scripted governor", "warning", "powersave",
        "sudo cpupower frequency-set -g performance  # for steady timings",
    )  # fmt: skip
    assert found["scripted vectors"].found == "none that speed this up"
    assert "scripted memory" not in found


def test_what_helps_on_android_is_what_works_there(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = "cores=8\ngovernor=schedutil\nclock_khz=600000\nclock_max_khz=2000000\ndisk_free_kb=1000\n"
    scripted(monkeypatch, facts, name="adb://phone")
    found = by_name(environment.check_environment(None, "told"))
    governor = found["adb://phone governor"]
    assert (governor.status, governor.found) == ("warning", "schedutil")
    assert "only root may hold it" in governor.fix and "adb shell su -c" in governor.fix
    assert found["adb://phone clock"].fix == "the governor raises it under load"
    assert found["adb://phone disk"].fix == "free some space there"
    assert "sudo" not in " ".join(f.fix for name, f in found.items() if name.startswith("adb:"))


@pytest.mark.parametrize(
    ("flags", "warned"), [("avx2", True), ("avx2 avx512_vnni", False), ("asimddp", False)]
)
def test_int8_without_dot_products_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, flags: str, warned: bool
) -> None:
    scripted(monkeypatch, f"cores=2\nflags={flags}\n")
    assert ("int8" in by_name(environment.check_environment(LOCAL, "told"))) == warned


def test_a_runtime_that_the_device_lacks_comes_with_its_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    text = '{"error": "no onnxruntime", "kind": "MissingDependency", "hint": "pip install onnxruntime"}'
    scripted(monkeypatch, "cores=2\n", Answer(3, text, ""))
    assert by_name(environment.check_environment(None, "told"))["device scripted"] == Finding(
        "device scripted", "missing", "no onnxruntime (on scripted)", "pip install onnxruntime"
    )


def test_a_device_that_does_not_answer_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Silent(Scripted):
        def run(self, argv: Any, stdin: str, timeout_s: float) -> Answer:
            raise DeviceError("no route", "plug it in")

    whole = _base.device_from_url
    silent = Silent(Answer(0, "", ""))
    monkeypatch.setattr(
        environment, "device_from_url", lambda url, setup=None: silent if url == "silent" else whole(url)
    )
    found = environment.check_environment(LOCAL, "silent")
    assert Finding("device scripted", "missing", "no route", "plug it in") in found


def test_a_far_target_says_that_times_are_not_its_own() -> None:
    found = by_name(environment.check_environment(ORIN, "fake"))
    assert found["target orin"].status == "warning"
    assert "times are taken on fake" in found["target orin"].fix
    assert "Some Jetson" in found["trtexec"].found


def test_trtexec_is_found_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment.shutil, "which", lambda name: f"/opt/{name}")
    assert by_name(environment.check_environment(None, "fake"))["trtexec"] == Finding(
        "trtexec", "ok", "/opt/trtexec"
    )


def test_a_package_that_crashes_the_interpreter_is_told_apart_from_those_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "crashing.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    (tmp_path / "noisy.py").write_text("print('@bad json it lies')\nprint('half a line', end='')\n")
    (tmp_path / "raising.py").write_text("raise RuntimeError('operator x::nms does not exist\\nmore')\n")
    (tmp_path / "leaving.py").write_text("raise SystemExit(0)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    broken = environment.broken_imports(["noisy", "crashing", "raising", "leaving", "decimal"])
    assert broken == {
        "crashing": "python ended with status -11",
        "raising": "RuntimeError: operator x::nms does not exist",
        "leaving": "SystemExit: 0",
    }


def test_a_package_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hanging.py").write_text("import threading\nthreading.Event().wait()\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(environment, "IMPORT_S", 1.0)
    assert "longer than 1 s" in environment.broken_imports(["hanging"])["hanging"]


def test_a_package_that_needs_help_to_load_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torchvision beside another build of torch: it loads once what it misses has been put in its place."""
    (tmp_path / "pytest_of_another_build.py").write_text("import sys\nassert hasattr(sys, 'helped')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(environment, "REQUIRED", (("torch", "", "networks"),))
    monkeypatch.setattr(environment, "OPTIONAL", (("pytest", "pytest_of_another_build", "tests"),))
    monkeypatch.setattr(environment, "ON_TORCHVISION", ("pytest_of_another_build",))
    monkeypatch.setattr(environment, "HELP", "import sys; sys.helped = True")
    assert by_name(environment.check_environment(None, "fake"))["pytest"].status == "warning"
    monkeypatch.setattr(environment, "HELP", "")
    found = by_name(environment.check_environment(None, "fake"))["pytest"]
    assert found.status == "optional"
    assert "does not load: AssertionError" in found.found


@pytest.mark.parametrize(
    ("version", "least", "older"),
    [
        ("2.13.0+cpu", "2.13", False),
        ("2.9.1", "2.13", True),
        ("1.6.1", "1.6.1", False),
        ("10", "9.9", False),
        ("1.0", "", False),
    ],
)
def test_versions_are_compared_by_their_numbers(version: str, least: str, older: bool) -> None:
    assert environment.is_older(version, least) == older


def test_a_package_that_is_too_old_says_which_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["pytest>=9999; extra == 'dev'", "other[x]<3,>=1.5", "plain"]
    monkeypatch.setattr(environment.metadata, "requires", lambda name: wanted)
    assert by_name(environment.check_environment(None, "fake"))["pytest"] == Finding(
        "pytest",
        "missing",
        f"{metadata.version('pytest')}; 9999 or newer is needed",
        "pip install --upgrade pytest",
    )


def test_torchvision_is_installed_for_the_torch_that_is_there() -> None:
    assert environment.pip_line("torchvision", "2.13.0+cpu").endswith(
        "--index-url https://download.pytorch.org/whl/cpu"
    )
    assert environment.pip_line("torchvision", "2.13.0") == "pip install --upgrade torchvision"
    assert environment.pip_line("tensorrt", "") == "pip install tensorrt-cu12"


def test_an_old_python_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "PYTHON", (4, 0))
    assert by_name(environment.check_environment(None, "fake"))["python"].status == "missing"


def test_looking_imports_nothing_heavy_into_this_process() -> None:
    code = "import sys, edgeprune.diagnose.environment; print({'torch', 'numpy', 'onnxruntime'} & {*sys.modules} or [])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
