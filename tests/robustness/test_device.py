"""Square asks a device itself: one session there for all questions, counted, alone, resumable, and gone afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import adb_stand_in
import arm64
import numpy as np
import pytest
import torch
from onnx import helper
from onnx_files import save
from sshd import Sshd, sshd

from edgeprune import targets
from edgeprune.data.collection import Split, in_memory
from edgeprune.devices._base import Device, ShellDevice, device_from_url
from edgeprune.errors import DeviceError, MissingDependency, ModelError, UsageError
from edgeprune.measure.engines import Engine
from edgeprune.measure.onnx_outputs import input_of
from edgeprune.plugins import build
from edgeprune.recipe.schema import AttackTable
from edgeprune.robustness import job, models_under_attack, readings, remote_model, stage
from edgeprune.robustness.job import attack_job

# Another word for the same Python: to edgeprune it is another machine's.
PYTHON = str(Path(sys.executable).with_name("python3"))
QUERIES = 7


@dataclass(frozen=True)
class Board:
    """A machine, the folder that its temporary files lie in, and its server where it has one."""

    device: ShellDevice
    there: Path
    server: Sshd | None = None


def attached(url: str) -> ShellDevice:
    device = device_from_url(url)
    assert isinstance(device, ShellDevice)
    return device


@pytest.fixture(scope="module")
def over_ssh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    folder = tmp_path_factory.mktemp("ssh")
    (folder / "there").mkdir()
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory(dir="/tmp") as short,
        sshd(folder / "sshd", environment=f"TMPDIR={folder}/there") as server,
    ):
        patch.setattr(tempfile, "tempdir", short)
        patch.setenv("PATH", f"{server.bin}:{os.environ['PATH']}")
        yield Board(attached(f"{server.url}?python={sys.executable}"), folder / "there", server)


@pytest.fixture(params=["local", "ssh", "adb"])
def board(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Board:
    """One machine of each kind."""
    if request.param == "ssh":
        return request.getfixturevalue("over_ssh")
    if request.param == "local":
        (tmp_path / "there").mkdir()
        monkeypatch.setenv("TMPDIR", str(tmp_path / "there"))
        return Board(attached(f"local://?python={PYTHON}"), tmp_path / "there")
    path = adb_stand_in.install(tmp_path / "adb")
    (path / "python3").symlink_to(sys.executable)
    patched = f"{path}:{os.environ['PATH']}"
    monkeypatch.setenv("PATH", patched)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p.endswith("site-packages")))
    return Board(attached(f"adb://{adb_stand_in.SERIAL}"), tmp_path / "adb" / "phone")


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A linear network; some of its answers change within the ball, some do not."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((192, 10)).astype(np.float32)
    tensors = {"w": weights, "b": -weights.sum(0) / 2}
    nodes = [
        helper.make_node("Flatten", ["input"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w", "b"], ["logits"]),
    ]
    path = tmp_path_factory.mktemp("net") / "net.onnx"
    return save(path, nodes, tensors, ["N", 3, 8, 8], 10)


def victim(
    net: Path, device: Device, scratch: Path, log: Callable[[str], None] = lambda _: None
) -> job.ModelUnderAttack:
    """The file, judged by the device; only asked, so that nothing but Square runs."""
    here = replace(models_under_attack.of_file("net.onnx", net, scratch, "here"), twin=None)
    return models_under_attack.on_device(
        here, net, input_of(net), models_under_attack.OnDevice(device, None, scratch, log, 0.0)
    )


def images(net: Path, count: int = 24) -> Split:
    """Random images with the classes that the file gives them."""
    pixels = torch.randint(
        0, 256, (count, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    here = models_under_attack.of_file("net.onnx", net, net.parent / "scratch", "here")
    return in_memory("test", pixels, here.answers(pixels / 255).argmax(1))


def square(batch: int = 0) -> job.Job:
    job = attack_job(AttackTable(name="standard", eps="2/255", batch=batch), seed=0, data="some")
    return replace(job, attacks={"square": build("attacks", "square", {"queries": QUERIES})})


def run(found: job.ModelUnderAttack, split: Split, scratch: Path, batch: int = 0) -> job.Verdicts:
    return stage.run(found, split, square(batch), scratch=scratch, log=lambda _: None)


def left(board: Board) -> list[str]:
    """What lies on the machine; what another process removes takes its moment."""
    until = time.monotonic() + 30
    while (
        found := [p.name for p in board.there.iterdir() if "ssh" not in p.name]
    ) and time.monotonic() < until:
        time.sleep(0.02)
    return found


def test_square_asks_the_device_itself_in_one_session(board: Board, net: Path, tmp_path: Path) -> None:
    said: list[str] = []
    there, split = victim(net, board.device, tmp_path / "s", said.append), images(net)
    assert there.fast is None and there.where == board.device.where()
    assert (
        there.notes[-1]
        == f"Square asked the device: a session of onnxruntime that stayed open on {there.where.split()[0]}."
    )
    verdicts = run(there, split, tmp_path / "there-state")
    here = replace(models_under_attack.of_file("net.onnx", net, tmp_path / "s", "here"), twin=None)
    assert verdicts.by == run(here, split, tmp_path / "here-state").by
    assert 0 < sum(verdicts.survived) < len(split)
    assert len(said) == 1 and said[0].startswith(
        f"attack: net.onnx answers on {board.device.name} (onnxruntime 1."
    )
    assert left(board) == []


def test_every_image_that_square_asks_about_is_one_that_the_device_answered(
    over_ssh: Board, net: Path, tmp_path: Path
) -> None:
    there, split = victim(net, over_ssh.device, tmp_path / "s"), images(net)
    verdicts = run(there, split, tmp_path / "state")
    rows = readings.readings_of(there, square(), verdicts, part="test")
    by = {r.metric: r for r in rows}["broken_by_square"]
    queries, tried = by.conditions["queries"], by.conditions["tried"]
    assert tried * 1 < queries <= tried * QUERIES
    # One image for the classes, each image as it is, two looks of the attack itself, and the verdict.
    assert isinstance(there.answers, remote_model.Asked)
    assert there.answers.images == 1 + len(split) + queries + 3 * tried
    assert there.answers.sent < 4 * 3 * 8 * 8 * there.answers.images, "what did not change is not sent again"
    robust = next(r for r in rows if r.metric == "robust_accuracy")
    assert any(note.startswith("Square asked the device") for note in robust.conditions["notes"])
    assert robust.where == f"{over_ssh.device.name} x86_64"


def test_answers_are_those_of_this_machine_however_many_messages_they_take(
    over_ssh: Board, net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = victim(net, over_ssh.device, tmp_path)
    here = models_under_attack.of_file("net.onnx", net, tmp_path, "here")
    monkeypatch.setattr("edgeprune.agent.protocol.MOST_BYTES", 5 * 4 * 3 * 8 * 8)
    x = torch.rand(13, 3, 8, 8)
    with there.asked():
        for batch in (x, x.clone().index_fill_(3, torch.tensor([2]), 0.5), x[:4], x[:0]):
            torch.testing.assert_close(there.answers(batch), here.answers(batch), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(there.answers(x[:2]), here.answers(x[:2]), atol=1e-5, rtol=1e-5)


def test_who_is_asked_is_alone_on_the_device(board: Board, net: Path, tmp_path: Path) -> None:
    there = victim(net, board.device, tmp_path)
    with there.asked():
        with board.device.exclusively():
            pass  # nothing is held before the first question
        there.answers(torch.rand(1, 3, 8, 8))
        with pytest.raises(DeviceError, match="in use: by"), board.device.exclusively():
            pass
    with board.device.exclusively():
        with pytest.raises(DeviceError, match="in use: by") as caught:
            there.answers(torch.rand(1, 3, 8, 8))
        assert caught.value.exit_code == 6
    assert left(board) == []


def test_a_connection_that_is_lost_in_the_middle_is_said_and_the_attack_goes_on_at_its_batch(
    over_ssh: Board, net: Path, tmp_path: Path
) -> None:
    split, server = images(net), over_ssh.server
    assert server is not None
    undisturbed = run(victim(net, over_ssh.device, tmp_path / "s"), split, tmp_path / "a", batch=8)
    there = victim(net, over_ssh.device, tmp_path / "s")
    asked: Any = there.answers
    counts: list[int] = []

    def cut(x: torch.Tensor) -> torch.Tensor:
        counts.append(len(x))
        if len(counts) == 15:
            server.cut()
        return asked(x)

    with pytest.raises(DeviceError, match=r"was lost while it ran \(agent\)") as caught:
        run(replace(there, answers=cut), split, tmp_path / "b", batch=8)
    assert caught.value.exit_code == 6 and "what was finished is kept" in caught.value.hint
    assert left(over_ssh) == []
    again = victim(net, over_ssh.device, tmp_path / "s")
    resumed = run(again, split, tmp_path / "b", batch=8)
    assert (resumed.by, resumed.queries) == (undisturbed.by, undisturbed.queries)
    assert isinstance(again.answers, remote_model.Asked)
    assert again.answers.images < sum(undisturbed.queries.values()), "finished batches are not asked again"


HOLD = """
import signal, sys
# What was started in the background of a shell would pass over Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
import numpy as np
from edgeprune.agent import protocol as frames
from edgeprune.devices._base import device_from_url
from pathlib import Path
device, x = device_from_url(sys.argv[2]), np.ones((64, 3, 8, 8), np.float32)
with device.exclusively(), device.holding({"model": Path(sys.argv[1])}) as there:
    request = {"op": "serve", "runtime": "onnxruntime", "model": there["model"]}
    with device.talking(request) as talk:
        while True:
            talk.hear(frames.head(talk.hear(frames.HEAD_BYTES, 60)).size, 60)
            print("answered", flush=True)
            talk.send(frames.packed(*frames.images(x, None)), 60)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_who_is_killed_while_it_asks_leaves_nothing_there(
    over_ssh: Board, net: Path, how: signal.Signals
) -> None:
    assert over_ssh.server is not None
    gone(over_ssh.server)  # what the test before this one cut off may need a moment
    url = f"{over_ssh.device.name}?python={sys.executable}"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(net), url],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "answered\n"
        assert len(agents_of(over_ssh.server)) == 1
        holder.send_signal(how)
        holder.wait(60)
        holder.stdout.close()
    finally:
        holder.kill()
        holder.wait(60)
    assert left(over_ssh) == []
    gone(over_ssh.server)
    with over_ssh.device.exclusively(wait_s=30):
        pass


def gone(server: Sshd) -> None:
    """Wait until no agent runs there any more."""
    until = time.monotonic() + 30
    while agents_of(server) and time.monotonic() < until:
        time.sleep(0.05)
    assert not agents_of(server)


def agents_of(server: Sshd) -> list[int]:
    """Processes that run the agent's program."""
    found: list[int] = []
    for words in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            argv = words.read_bytes().split(b"\0")
            state = (words.parent / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if argv[0] == sys.executable.encode() and b"edgeprune.pyz" in b" ".join(argv) and state != "Z":
            found.append(int(words.parent.name))
    return found


@pytest.mark.parametrize("fault", ["no python", "no model", "shape", "crash", "silence", "text", "words"])
def test_what_goes_wrong_there_is_said_with_its_kind(
    net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    python = PYTHON
    if fault in PYTHONS:
        python = str(tmp_path / "python")
        Path(python).write_text(f"#!/bin/sh\n{PYTHONS[fault].replace('PYTHON', PYTHON)}\n")
        Path(python).chmod(0o755)
    if fault == "silence":
        monkeypatch.setattr(remote_model, "OPEN_S", 0.2)
    file = tmp_path / "net.onnx"
    file.write_bytes(b"no model" if fault == "no model" else net.read_bytes())
    here = replace(models_under_attack.of_file("net.onnx", net, tmp_path, "here"), twin=None)
    device = attached(f"local://?python={'/no/such/python' if fault == 'no python' else python}")
    there = models_under_attack.on_device(
        here, file, input_of(net), models_under_attack.OnDevice(device, None, tmp_path)
    )
    kind, says = FAULTS[fault]
    with pytest.raises(kind, match=says) as caught:
        there.answers(torch.rand(2, 1 if fault == "shape" else 3, 8, 8))
    assert caught.type is kind and caught.value.hint is not None
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("edgeprune")]


# A way on which one byte arrives as another one.
UNCLEAN = 'import os\nwhile (b := os.read(0, 99)):\n    os.write(1, b.replace(b"\\xed", b"?"))'
PYTHONS = {
    "crash": "kill -11 $$",
    "silence": "exec cat >/dev/null",
    "text": f"PYTHON \"$@\" | PYTHON -c '{UNCLEAN}'",
    "words": "echo this is no agent",
}
FAULTS: dict[str, tuple[type[Exception], str]] = {
    "no python": (MissingDependency, "local has no /no/such/python"),
    "no model": (ModelError, "can't open .*on local"),
    "shape": (UsageError, r"the input must be float32 .*on local"),
    "crash": (DeviceError, "was killed by signal 11"),
    "silence": (DeviceError, "did not answer for 0.2 s and was stopped"),
    "text": (DeviceError, "something else than a JSON object"),
    "words": (DeviceError, "something else than a JSON object: 'this is no agent'"),
}


def test_a_device_whose_agent_can_not_stay_open_is_asked_for_verdicts_alone(
    net: Path, tmp_path: Path
) -> None:
    """The canned device answers image i with class i modulo 10, whatever the file says."""
    there = victim(net, device_from_url("fake"), tmp_path)
    x = torch.rand(12, 3, 8, 8)
    assert there.answers(x).argmax(1).tolist() == [*range(10), 0, 1]
    assert there.fast is not None
    torch.testing.assert_close(
        there.fast(x), models_under_attack.of_file("n", net, tmp_path, "here").answers(x)
    )
    assert there.notes[-1] == "Square asked a copy of the file here; every verdict is that of fake."


def test_where_the_target_has_tensorrt_an_engine_is_built_there_once_and_asked(
    net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Path] = []

    def engines(files: Any, place: Any) -> Any:
        built.extend(files.values())
        (place.folder / "it.engine").write_bytes(b"an engine")
        return {name: Engine(place.folder / "it.engine", net, "fp32") for name in files}

    monkeypatch.setattr(models_under_attack, "choose", lambda target, device: ("tensorrt", ("On the GPU.",)))
    monkeypatch.setattr(models_under_attack, "built_engines", engines)
    here = replace(models_under_attack.of_file("net.onnx", net, tmp_path, "here"), twin=None)
    device, target = attached(f"local://?python={PYTHON}"), targets.target("jetson-orin-nano")
    there = models_under_attack.on_device(
        here, net, input_of(net), models_under_attack.OnDevice(device, target, tmp_path / "scratch")
    )
    assert there.notes == (
        "On the GPU.",
        "Square asked the device: a session of tensorrt that stayed open on local.",
    )
    assert built == [], "nothing is built before the first question"
    for _ in range(2):
        with pytest.raises(MissingDependency, match=r"(?i)tensorrt.*\(on local\)"):
            there.answers(torch.rand(1, 3, 8, 8))
    assert built == [net]


def test_this_python_and_canned_answers_are_not_elsewhere() -> None:
    assert not models_under_attack.elsewhere(device_from_url("local"))
    assert not models_under_attack.elsewhere(device_from_url(f"local://?python={sys.executable}"))
    assert not models_under_attack.elsewhere(device_from_url("fake"))
    assert models_under_attack.elsewhere(device_from_url(f"local://?python={PYTHON}"))
    assert models_under_attack.elsewhere(device_from_url("ssh://board"))


@pytest.mark.skipif(bool(arm64.why_not()), reason=arm64.why_not() or "-")
def test_square_asks_an_arm64_under_qemu(net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may lock an sshd into a folder")
    with (
        arm64.locked_in(tmp_path) as (start, more),
        tempfile.TemporaryDirectory(dir="/tmp") as short,
        sshd(tmp_path / "sshd", more=more, environment=arm64.ENVIRONMENT, start=start) as server,
    ):
        monkeypatch.setenv("PATH", f"{server.bin}:{os.environ['PATH']}")
        monkeypatch.setattr(tempfile, "tempdir", short)
        device = attached(server.url)
        if device.run(["true"], "", 60).status != 0:
            pytest.skip("the kernel here lets nobody run arm64 programs")
        split = images(net, 8)
        there = victim(net, device, tmp_path / "s")
        verdicts = run(there, split, tmp_path / "state")
        here = replace(models_under_attack.of_file("net.onnx", net, tmp_path / "s", "here"), twin=None)
        assert there.where == f"{server.url} aarch64 (emulated)"
        assert verdicts.by == run(here, split, tmp_path / "here-state").by
        assert device.check(["ls", "-A", "/tmp"]) == ""
