"""A full disk, exhausted memory, a kill, and text that would be an order to a terminal: told, and nothing half done."""

from __future__ import annotations

import errno
import logging
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import nets
import paths
import pytest
import torch
from rich.table import Table
from typer.testing import CliRunner

from edgeprune import serialization, targets
from edgeprune.cli import output
from edgeprune.cli.app import app
from edgeprune.devices._base import Device
from edgeprune.devices.local import Local
from edgeprune.devices.transport.stream import Answer
from edgeprune.errors import (
    DeviceError,
    EdgepruneError,
    ModelError,
    NoRoom,
    UsageError,
    translated_os_errors,
    visible,
)
from edgeprune.models.batchnorm_folding import folded
from edgeprune.models.inference import logits
from edgeprune.records import Artifact, InputSpec
from edgeprune.report.page import escape_html, escape_markdown
from edgeprune.runtimes.engine.build_script import engine_script

ARCH = f"{paths.NETS}:Residual"
HOSTILE = "a\x1b]0;owned\x07b\rc\x9bd\u202ee\u2066f\x7fg"
SEEN = "a\\x1b]0;owned\\x07b\\rc\\x9bd\\u202ee\\u2066f\\x7fg"
ALLOCATOR = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "residual.pt"
    torch.save(nets.build("residual").state_dict(), path)
    return path


def command(weights: Path, out: Path) -> list[str]:
    return [
        "compress", str(weights), "--arch", ARCH, "--input", "3x8x8", "--target", "local", "-o", str(out),
        "--precision", "fp32", "--set", "prune.method=magnitude", "--set", "prune.repair=none",
        "--set", "measure.iterations=20", "--set", "measure.seconds=0.5",
    ]  # fmt: skip


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.slow
def test_a_run_that_meets_a_full_disk_ends_with_7_and_goes_on_to_the_same_files(
    weights: Path, tmp_path: Path
) -> None:
    once = CliRunner().invoke(app, command(weights, tmp_path / "once"))
    assert once.exit_code == 0, once.output
    for size in (500, 15_000):
        with largest_file(size):
            done = CliRunner().invoke(app, command(weights, tmp_path / "run"))
        assert done.exit_code == 7, done.output
        assert "can't be written: File too large; " in done.stderr and "bytes are needed" in done.stderr
        assert "Traceback" not in done.output
        assert not [*(tmp_path / "run").rglob("tmp-*"), *(tmp_path / "run").rglob("*.tmp")]
    assert CliRunner().invoke(app, command(weights, tmp_path / "run")).exit_code == 0
    for name in ("model.onnx", "dense.onnx", "model.pt2", "weights.safetensors", "plan.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "once" / name).read_bytes(), name


def test_a_file_that_finds_no_room_leaves_the_one_before_and_says_what_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NoRoom) as caught, serialization.replace_file(path) as file:
        file.write(bytes(1234))
    assert (
        f"{path} can't be written: No space left on device; 1234 bytes are needed, " in caught.value.message
    )
    assert f"bytes are free in {tmp_path}" in caught.value.message
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"] and path.read_bytes() == b"before"


def test_what_is_renamed_is_on_the_disk_before_and_so_is_its_new_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[tuple[str, str]] = []
    sync, rename = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        steps.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        sync(descriptor)

    def renamed(source: Path, to: Path) -> None:
        steps.append(("rename", Path(to).name))
        rename(source, to)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    with serialization.replace_folder(tmp_path / "stage" / "key") as folder:
        (folder / "one").write_bytes(b"1")
    assert steps == [
        ("sync", "one"),
        ("sync", "tmp-key"),
        ("rename", "key"),
        ("sync", "stage"),
        ("sync", tmp_path.name),
    ]
    steps.clear()
    with serialization.replace_file(tmp_path / "file") as file:
        file.write(b"1")
    assert steps == [("sync", f"file.{os.getpid()}.tmp"), ("rename", "file"), ("sync", tmp_path.name)]


def test_what_a_killed_process_left_is_swept_and_what_a_live_one_has_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    program = (
        "import sys; from edgeprune import serialization as codec; from pathlib import Path\n"
        "with codec.scratch_folder() as folder: (folder / 'x').touch(); print(folder, flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    with process:
        assert process.stdout is not None
        other = Path(process.stdout.readline().strip())
        with serialization.scratch_folder() as mine:
            assert other.is_dir() and mine.is_dir()
        process.kill()
        process.wait()
    (tmp_path / "report.md.1.tmp").touch()
    (tmp_path / "edgeprune-ssh-0").mkdir()
    serialization.sweep(tmp_path, serialization.LEFT_FILES)
    with serialization.scratch_folder() as mine:
        assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "edgeprune-ssh-0", mine])


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(), RuntimeError(ALLOCATOR), RuntimeError("not enough memory: you tried to allocate 9 bytes"),
        RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), RuntimeError("std::bad_alloc"),
        RuntimeError("bad allocation"), RuntimeError("can't start new thread"),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), ImportError("x.so: failed to map segment from shared object"),
    ],
)  # fmt: skip
def test_exhausted_memory_is_told_from_a_fault_of_the_network(error: Exception) -> None:
    class Network(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise error

    with pytest.raises(NoRoom, match="^out of memory: ") as caught, translated_os_errors():
        logits(Network(), torch.zeros(2, 3))
    assert caught.value.exit_code == 7 and "tune.batch" in caught.value.hint
    with pytest.raises(NoRoom), translated_os_errors():
        try:
            raise error
        except Exception as cause:
            raise ModelError("the file is broken") from cause


def test_another_result_for_want_of_memory_is_no_result() -> None:
    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError(ALLOCATOR)

    with pytest.raises(NoRoom):
        folded(Network(), torch.zeros(1, 3, 4, 4))


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(ZeroDivisionError), translated_os_errors():
        raise ZeroDivisionError
    with pytest.raises(UsageError), translated_os_errors():
        try:
            raise OSError(errno.ENOENT, "no such file")
        except OSError as error:
            raise UsageError("no file 'x'") from error


class Remote(Local):
    @property
    def name(self) -> str:
        return "ssh://board"


@pytest.mark.parametrize(("device", "kind"), [(Local(), NoRoom), (Remote(), DeviceError)])
@pytest.mark.parametrize(
    "answer",
    [
        Answer(7, '{"error": "out of memory: x", "kind": "NoRoom", "hint": ""}', ""),
        Answer(-6, "", "terminate called after throwing an instance of 'std::bad_alloc'"),
    ],
)
def test_room_that_is_missing_on_another_machine_is_a_fault_of_the_device(
    device: Device, kind: type[EdgepruneError], answer: Answer
) -> None:
    with pytest.raises(EdgepruneError) as caught:
        device.told(["agent"], answer)
    assert type(caught.value) is kind


def test_sigterm_ends_a_run_as_ctrl_c_does_with_143_and_a_word(weights: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "edgeprune", *command(weights, tmp_path / "run")],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    with process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("measure: "):
                break
        until = time.monotonic() + 60
        while not [*tmp_path.glob("edgeprune-*/0-*")] and time.monotonic() < until:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        said = process.stderr.read()
    assert process.returncode == 143
    assert said.splitlines()[-2:] == [
        "error: stopped by SIGTERM",
        "hint: start the same command again to go on",
    ]
    assert not [*tmp_path.glob("edgeprune-*")] and not [*(tmp_path / "run").rglob("tmp-*")]


def test_control_characters_leave_as_escapes_on_every_way(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert visible(HOSTILE) == SEEN and visible("two\nlines\tand é ✅") == "two\nlines\tand é ✅"
    assert str(UsageError(HOSTILE)) == SEEN and UsageError("x", HOSTILE).hint == SEEN
    output.log(HOSTILE)
    output.print_lines([HOSTILE])
    table = Table(title=HOSTILE)
    table.add_column("name", no_wrap=True)
    table.add_row(HOSTILE)
    table.add_row("[link=http://x]y[/]")
    output.print_table(table)
    out, err = capsys.readouterr()
    assert err == f"{SEEN}\n" and out.startswith(f"{SEEN}\n") and "[link=http://x]y[/]" in out
    assert not set("\x1b\x07\r\x9b\u202e\u2066\x7f") & set(out)
    record = logging.LogRecord("edgeprune", logging.INFO, "", 0, "found %s", (HOSTILE,), None)
    assert output.shown(record) and record.getMessage() == f"found {SEEN}"
    assert escape_html(HOSTILE) == SEEN
    assert not set("\x1b\x07\r\x9b\u202e\u2066\x7f") & set(escape_markdown(HOSTILE))


@pytest.mark.parametrize(
    ("title", "setup", "file"),
    [
        ("board @JETPACK@", {"jetpack": "\ntouch PWNED\n#"}, "model.onnx"),
        (
            "board\x85\u2028\rtouch PWNED",
            {"jetpack": "'\ntouch PWNED\n'", "tensorrt": "@JETPACK@"},
            "model.onnx",
        ),
        ("$(touch PWNED)`touch PWNED`", {"tensorrt": "$(touch PWNED)"}, "@TITLE@\ntouch PWNED\n.onnx"),
    ],
)
def test_no_value_of_a_target_or_a_file_runs_in_the_engine_script(
    title: str, setup: dict[str, str], file: str, tmp_path: Path
) -> None:
    target = replace(targets.target("jetson-orin-nano"), title=title, setup=setup)
    artifact = Artifact(file, "onnx", "fp32", InputSpec((3, 8, 8), 5), "", 1, opset=18)
    text = engine_script(target, artifact, dynamic_batch=True)
    (tmp_path / "build_engine.sh").write_text(text)
    subprocess.run(["sh", "build_engine.sh"], cwd=tmp_path, capture_output=True, check=False, timeout=30)
    assert not (tmp_path / "PWNED").exists()
    head = text[: text.index("set -eu")].splitlines()
    assert all(line.startswith("#") for line in head if line)


@pytest.mark.parametrize(
    "name", ["n" * 5000, "circle.pt", "file/inside.pt", "pipe.pt", "endless.safetensors"]
)
def test_a_path_that_the_system_refuses_is_no_bug(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "circle.pt").symlink_to("circle.pt")
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "endless.safetensors").symlink_to("/dev/zero")
    for argv in (["why", name], ["evaluate", name, "--data", name], ["gate", name, "--budget", "macs=1"]):
        done = CliRunner().invoke(app, argv)
        assert done.exit_code == 2, done.output
