"""What every machine with a shell keeps to: this one, one behind a real sshd, and one behind a stand-in for adb."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import adb_stand_in
import pytest
from sshd import sshd

from edgeprune.devices._base import ShellDevice, device_from_url
from edgeprune.errors import DeviceError, UsageError
from edgeprune.host.machine import FACTS

HOSTILE = 'a b\'; touch pwned; $(touch pwned) `touch pwned` "$HOME" * \\ \n-end é'


@pytest.fixture(scope="module", params=["local", "ssh", "adb"])
def device(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ShellDevice]:
    """One machine of each kind, with a temporary folder of its own."""
    folder = tmp_path_factory.mktemp(request.param)
    there = folder / "there"
    there.mkdir()
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(dir="/tmp") as short:
        if request.param == "local":
            patch.setenv("TMPDIR", str(there))
            yield attached("local")
        elif request.param == "adb":
            patch.setenv("PATH", f"{adb_stand_in.install(folder / 'adb')}:{os.environ['PATH']}")
            yield attached(f"adb://{adb_stand_in.SERIAL}")
        else:
            patch.setattr(
                tempfile, "tempdir", short
            )  # where the socket of a shared connection lies: a short path
            with sshd(folder / "sshd", environment=f"TMPDIR={there}") as server:
                patch.setenv("PATH", f"{server.bin}:{os.environ['PATH']}")
                yield attached(server.url)


def attached(url: str) -> ShellDevice:
    found = device_from_url(url)
    assert isinstance(found, ShellDevice)
    return found


def soon(true: Callable[[], bool]) -> bool:
    """Whether it becomes true; what happens in another process takes its time."""
    until = time.monotonic() + 30
    while not true() and time.monotonic() < until:
        time.sleep(0.02)
    return true()


def test_a_command_has_its_input_its_outputs_and_its_status(device: ShellDevice) -> None:
    answer = device.run(["sh", "-c", "cat; echo wrong >&2; exit 3"], "one\ntwo", 60)
    assert answer.status == 3
    assert answer.stdout == "one\ntwo"
    assert answer.stderr.strip() == "wrong"
    assert device.run(["true"], "", 60) == (0, "", "")
    assert device.check(["cat"]) == "", "no input is the end of input"


@pytest.mark.parametrize("status", [1, 127, 255])
def test_a_status_is_the_commands_whatever_the_way_there_makes_of_it(
    device: ShellDevice, status: int
) -> None:
    assert device.run(["sh", "-c", f"exit {status}"], "", 60).status == status


def test_a_killed_command_is_told_by_its_signal(device: ShellDevice) -> None:
    assert device.run(["sh", "-c", "kill -9 $$"], "", 60).status == -9


def test_no_word_of_a_command_is_read_by_a_shell(device: ShellDevice, tmp_path: Path) -> None:
    words = [HOSTILE, "", "-n", "~", "{a,b}", "!!", "#x", "\t"]
    assert device.run(["printf", "%s|", *words], "", 60).stdout == "".join(f"{w}|" for w in words)
    assert not list(tmp_path.rglob("pwned"))
    assert not Path("pwned").exists()


def test_a_long_input_arrives_whole(device: ShellDevice) -> None:
    text = "0123456789abcdef\n" * 20_000
    assert device.run(["cat"], text, 60).stdout == text


def test_a_command_that_takes_too_long_is_killed_with_what_it_started(
    device: ShellDevice, tmp_path: Path
) -> None:
    note = tmp_path / "pid"
    script = 'sleep 600 & echo $! >"$1"; echo so far >&2; wait'
    with pytest.raises(DeviceError, match=r"longer than 1 s .*sleep 600") as caught:
        device.run(["sh", "-c", script, "sh", str(note)], "", 1)
    assert caught.value.exit_code == 6
    assert "so far" in caught.value.message
    assert soon(lambda: not running(int(note.read_text())))


def running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


@pytest.mark.parametrize("size", [0, 1, 3_000_003])
def test_a_file_comes_back_as_it_was(device: ShellDevice, tmp_path: Path, size: int) -> None:
    here = tmp_path / "some file.bin"
    here.write_bytes((bytes(range(256)) * (size // 256 + 1))[:size])
    with device.folder() as folder:
        device.put(here, f"{folder}/{HOSTILE}")
        device.get(f"{folder}/{HOSTILE}", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == here.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "some file.bin"]


def test_a_file_that_is_not_there_is_a_device_error(device: ShellDevice, tmp_path: Path) -> None:
    with pytest.raises(DeviceError):
        device.get(str(tmp_path / "nothing"), tmp_path / "back")
    with pytest.raises(DeviceError):
        device.put(tmp_path / "nothing", str(tmp_path / "copy"))
    with pytest.raises(DeviceError, match="can't be copied|failed"):
        (tmp_path / "here").write_text("x")
        device.put(tmp_path / "here", str(tmp_path / "no folder" / "copy"))
    assert [p.name for p in tmp_path.iterdir()] == ["here"]


def test_a_folder_goes_with_all_that_is_in_it(device: ShellDevice) -> None:
    with device.folder() as folder:
        device.check(["sh", "-c", 'mkdir "$1/a" && echo x >"$1/a/b"', "sh", folder])
        assert Path(folder, "a/b").is_file()
        assert Path(folder).stat().st_mode & 0o077 == 0, "other users have no business in it"
    assert not Path(folder).exists()


def test_files_are_held_under_names_that_every_system_takes(device: ShellDevice, tmp_path: Path) -> None:
    strange = tmp_path / "a b'; touch pwned; $(id) é.onnx"
    strange.write_text("model")
    with device.holding({"dense": strange, "compressed": strange}) as there:
        assert [Path(p).read_text() for p in there.values()] == ["model", "model"]
        assert all(
            set(Path(p).name) <= set("0123456789abcdefghijklmnopqrstuvwxyz_-.ABCDEF") for p in there.values()
        )
    with pytest.raises(UsageError, match="no file"), device.holding({"dense": tmp_path / "nothing"}):
        pass


def test_it_says_what_it_is(device: ShellDevice) -> None:
    facts = device.facts()
    assert facts["machine"] == os.uname().machine
    assert facts["cores"] == os.cpu_count()
    assert facts["disk_free_bytes"] > 0
    assert "emulated" not in facts
    assert device.where() == f"{device.name} {facts['machine']}"


def test_only_one_may_measure_at_a_time(device: ShellDevice) -> None:
    with device.exclusively():
        said = rf"in use: by .* process {os.getpid()}, since 20"
        with pytest.raises(DeviceError, match=said) as caught, device.exclusively():
            pass
        assert caught.value.exit_code == 6
        assert caught.value.hint
        assert device.run(["true"], "", 60).status == 0, "it is no lock for anything else"
    with device.exclusively():
        pass


def test_one_may_wait_for_the_other(device: ShellDevice) -> None:
    said: list[str] = []
    first = device.exclusively()
    first.__enter__()
    # It is told to wait before it waits: then the other one leaves.
    with device.exclusively(
        wait_s=60, log=lambda line: (said.append(line), first.__exit__(None, None, None))[0]
    ):
        pass
    assert len(said) == 1
    assert "waiting up to 60 s" in said[0]


HOLD = """
import os, signal, sys, time
# What was started in the background of a shell would pass over Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
from edgeprune.devices._base import device_from_url
device = device_from_url(sys.argv[1])
with device.folder() as folder, device.exclusively():
    print(folder, flush=True)
    device.run(["sh", "-c", "echo $$ >{}/pid; exec sleep 600".format(folder)], "", 600)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_program_leaves_nothing_there(device: ShellDevice, how: signal.Signals) -> None:
    command = [sys.executable, "-c", HOLD, device.name]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert holder.stdout is not None
    folder = Path(holder.stdout.readline().strip())
    assert soon(lambda: (folder / "pid").is_file() and bool((folder / "pid").read_text()))
    pid = int((folder / "pid").read_text())
    holder.send_signal(how)
    holder.wait()
    holder.stdout.close()
    assert soon(lambda: not folder.exists())
    assert device.name == "local" or soon(lambda: not running(pid))
    if running(pid):  # a child of this machine whose parent was killed ends by itself, here never
        os.kill(pid, signal.SIGKILL)
    with device.exclusively(wait_s=30):
        pass


def base(device: ShellDevice) -> Path:
    with device.folder() as folder:
        return Path(folder).parent


def test_what_a_dead_keeper_left_is_removed_by_the_next(device: ShellDevice) -> None:
    """As after a power cut: nobody was there to tidy up."""
    left = base(device) / "edgeprune-LeFt12"
    left.mkdir()
    (left / ".keeper").write_text("4194999 1\n\n")
    (left / "model.onnx").write_text("large")
    other = base(device) / "edgeprune-OtHeR1"
    other.mkdir()
    (base(device) / "edgeprune.lock").symlink_to("edgeprune-LeFt12/.keeper")
    with device.exclusively():
        assert not left.exists()
        assert other.exists(), "what has no note of a keeper is somebody else's"
    other.rmdir()


@pytest.mark.parametrize(("beat", "free"), [("now", False), ("old", True), ("of another start", True)])
def test_a_lock_whose_holder_was_not_heard_of_for_long_is_free(
    device: ShellDevice, beat: str, free: bool
) -> None:
    up = int(float(Path("/proc/uptime").read_text().split()[0]))
    when = {"now": up, "old": up - 91, "of another start": up + 5000}[beat]
    keeper = subprocess.Popen(["sh", "-c", "read x; :", "edgeprune-keeper"], stdin=subprocess.PIPE)
    folder = base(device) / "edgeprune-HeLd12"
    folder.mkdir()
    (folder / ".keeper").write_text(f"{keeper.pid} {max(0, when)}\nby somebody, since noon\n")
    lock = base(device) / "edgeprune.lock"
    lock.symlink_to("edgeprune-HeLd12/.keeper")
    try:
        if free:
            with device.exclusively():
                pass
            assert not lock.is_symlink()
        else:
            with pytest.raises(DeviceError, match="in use: by somebody, since noon"), device.exclusively():
                pass
            assert lock.is_symlink()
    finally:
        keeper.communicate(b"")
        lock.unlink(missing_ok=True)
        for file in (folder / ".keeper", folder):
            if file.exists():
                file.unlink() if file.is_file() else file.rmdir()


def test_two_who_take_over_a_stale_lock_at_once_do_not_both_have_it(device: ShellDevice) -> None:
    (base(device) / "edgeprune.lock").symlink_to("edgeprune-GoNe12/.keeper")
    code = HOLD.replace("device.run", "sys.stdin.readline() or device.run").replace('"", 600)', '"", 1)')
    holders = [
        subprocess.Popen(
            [sys.executable, "-c", code, device.name], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    ends: list[Any] = []
    for holder in holders:
        assert holder.stdout is not None
        ends.append(holder.stdout.readline().strip())
    for holder in holders:
        ends.append(holder.communicate("done\n")[1])
    assert sum(bool(folder) for folder in ends[:2]) == 1
    assert sum("in use: by" in said for said in ends[2:]) == 1, ends


def test_the_facts_are_asked_for_in_words_that_every_sh_reads() -> None:
    for shell in ("sh", "dash", "bash", "busybox sh"):
        words = shell.split()
        if (
            subprocess.run(
                ["sh", "-c", f"command -v {words[0]}"], capture_output=True, check=False
            ).returncode
            == 0
        ):
            done = subprocess.run(
                [*words, "-c", FACTS], capture_output=True, text=True, check=True, timeout=60
            )
            assert done.stderr == ""
            assert f"machine={os.uname().machine}\n" in done.stdout
