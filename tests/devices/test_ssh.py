"""The far machine behind ssh: its address, what can go wrong on the way, and the program that travels there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from onnx_files import write_net
from sshd import Sshd, free_port, sshd

from edgeprune.agent import archive
from edgeprune.devices._base import device_from_url, redacted
from edgeprune.devices.ssh import Ssh
from edgeprune.errors import DeviceError, MissingDependency, UsageError

ABOUT = {"op": "about", "runtime": "onnxruntime"}
PYTHON = f"?python={sys.executable}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    folder = tmp_path_factory.mktemp("ssh")
    (folder / "there").mkdir()
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory(dir="/tmp") as short,
        sshd(folder / "sshd", environment=f"TMPDIR={folder}/there") as started,
    ):
        patch.setattr(tempfile, "tempdir", short)
        patch.setenv("PATH", f"{started.bin}:{os.environ['PATH']}")
        yield started


@pytest.mark.parametrize(
    ("url", "name", "words"),
    [
        ("ssh://board", "ssh://board", ["--", "board"]),
        (
            "ssh://pi@board.local:2222/",
            "ssh://pi@board.local:2222",
            ["-l", "pi", "-p", "2222", "--", "board.local"],
        ),
        ("ssh://[fe80::1%eth0]:22", "ssh://[fe80::1%eth0]:22", ["-p", "22", "--", "fe80::1%eth0"]),
        ("ssh:10.0.0.7", "ssh://10.0.0.7", ["--", "10.0.0.7"]),
        ("ssh://me@[::1]?python=~/v/bin/python", "ssh://me@[::1]", ["-l", "me", "--", "::1"]),
    ],
)
def test_an_address_becomes_words_for_ssh(url: str, name: str, words: list[str]) -> None:
    device = device_from_url(url)
    assert device.name == name
    assert isinstance(device, Ssh)
    command = device.line.attach(["true"])
    assert command[0] == "ssh"
    assert command[-1] == "exec true"
    assert command[-1 - len(words) : -1] == words
    assert "BatchMode=yes" in command


@pytest.mark.parametrize(
    "address",
    [
        "-oProxyCommand=touch pwned", "pi@-oProxyCommand=touch", "-l@host", "a b", "a;touch pwned", "a|b", "$(id)",
        "`id`", "a'b", 'a"b', "a\nb", "a\\b", "a*", "~", "%h", " ", ".host", "höst", "host#x", "host/path", "host:22/x",
        "host:", "host:0", "host:65536", "host:x", "::1", "[::1", "[-o]", "[host]", "[::1%a b]", "@host", "pi@",
        "pi@@host", "host?python", "host?python=", "host?python=-c", "host?python=a%0ab", "host?shell=bash",
    ],
)  # fmt: skip
def test_a_hostile_or_wrong_address_is_refused(address: str) -> None:
    with pytest.raises(UsageError) as caught:
        device_from_url(f"ssh://{address}")
    assert caught.value.hint


@pytest.mark.parametrize(
    "url",
    [
        "ssh://pi:hunter2@host", "ssh:pi:hunter2@host", "ssh://pi:hunter2@host:22", "ssh://pi:hunter2:x@host",
        "ssh://pi@x:hunter2@host", "ssh://:hunter2@host", "ssh://pi:hun/hunter2@host", "ssh://a:hunter2\n@host",
        "xssh://pi:hunter2@host", "ssh://pi:hunter2@ho st",
    ],
)  # fmt: skip
def test_a_password_is_refused_and_never_said_again(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        device_from_url(url)
    assert "hunter2" not in caught.value.message + caught.value.hint
    assert "hunter2" not in redacted(url)
    assert caught.value.__cause__ is None


def test_a_name_of_the_ssh_configuration_is_taken_from_there(server: Sshd) -> None:
    assert device_from_url("ssh://board").check(["echo", "hello"]) == "hello\n"


def test_commands_share_one_connection(server: Sshd) -> None:
    device = device_from_url("ssh://board")
    for _ in range(3):
        device.run(["true"], "", 60)
    log = (server.folder / "log").read_text()
    assert log.count("Accepted publickey") <= 2, "one for each name of the server"


def test_a_temporary_folder_with_spaces_is_no_trouble(server: Sshd, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(prefix="a b%h'", dir="/tmp") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        assert device_from_url("ssh://board").check(["echo", "hello"]) == "hello\n"
        assert list(Path(folder).glob("edgeprune-ssh-*/*")), "its socket lies there"


def test_a_shared_connection_is_not_put_where_others_may_write(
    server: Sshd, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        open_to_all = Path(folder, f"edgeprune-ssh-{os.getuid()}")
        open_to_all.mkdir()
        open_to_all.chmod(0o777)
        assert device_from_url("ssh://board").check(["echo", "hello"]) == "hello\n"
        assert not list(open_to_all.iterdir())


@pytest.mark.parametrize(
    ("url", "what", "fix"),
    [
        ("ssh://no-such-host.invalid", "no machine has this name", "~/.ssh/config"),
        (
            "ssh://nobody@127.0.0.1:{port}",
            "lets nobody in with our keys",
            "ssh-copy-id -p {port} nobody@127.0.0.1",
        ),
        ("ssh://localhost:{port}", "host key is not known", "ssh -p {port} localhost"),
        ("ssh://127.0.0.1:{closed}", "nothing listens on its port", "sudo systemctl start ssh"),
    ],
)
def test_a_machine_that_lets_nobody_in_says_why_and_what_to_do(
    server: Sshd, url: str, what: str, fix: str
) -> None:
    ports = {"port": server.port, "closed": free_port()}
    device = device_from_url(url.format(**ports))
    with pytest.raises(DeviceError) as caught:
        device.facts()
    assert caught.value.exit_code == 6
    assert device.name in caught.value.message
    assert what in caught.value.message
    assert fix.format(**ports) in caught.value.hint
    with pytest.raises(DeviceError, match=what), device.folder():
        pass


def test_a_changed_host_key_comes_with_the_line_that_forgets_the_old_one(
    server: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # no connection is shared there
    known = server.folder / "known_hosts"
    before = known.read_text()
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "other")], check=True)
    try:
        known.write_text(f"[127.0.0.1]:{server.port} {(tmp_path / 'other.pub').read_text()}")
        with pytest.raises(DeviceError, match="another host key than before") as caught:
            device_from_url(server.url).facts()
    finally:
        known.write_text(before)
    assert f'ssh-keygen -f "{known}" -R "[127.0.0.1]:{server.port}"' in caught.value.hint


def test_a_machine_without_ssh_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DeviceError, match="no ssh on this machine") as caught:
        device_from_url("ssh://board").facts()
    assert "apt install openssh-client" in caught.value.hint


def test_a_connection_that_is_lost_in_the_middle_is_told_from_a_command_that_failed(server: Sshd) -> None:
    device = device_from_url("ssh://board")
    with pytest.raises(
        DeviceError, match="connection to ssh://board was lost while it ran sleep 600"
    ) as caught:
        cut_while(server, lambda: device.run(["sleep", "600"], "", 600))
    assert "what was finished is kept" in caught.value.hint
    with pytest.raises(DeviceError, match=r"lost while it ran sh -c \(script\) sh a: the connection ended"):
        cut_while(server, lambda: device.run(["sh", "-c", "sleep 600\ntrue", "sh", "a"], "", 600))
    assert device.run(["true"], "", 60).status == 0, "the next command connects anew"


def test_what_a_lost_connection_leaves_is_cleaned_up(server: Sshd) -> None:
    device = device_from_url("ssh://board")
    with pytest.raises(DeviceError, match="lost"), device.folder() as folder, device.exclusively():
        Path(folder, "large").write_text("model")
        cut_while(server, lambda: device.run(["sleep", "600"], "", 600))
    with device.exclusively(wait_s=30):
        assert not Path(folder).exists()


def cut_while(server: Sshd, work: Any) -> None:
    """Do work that starts a sleep there, and cut the connection once it runs."""
    stop = threading.Event()

    def cut() -> None:
        while not stop.wait(0.05):
            out = subprocess.run(
                ["ps", "-A", "-o", "args="], capture_output=True, text=True, check=False
            ).stdout
            if "sleep 600\n" in out:
                server.cut()
                return

    watcher = threading.Thread(target=cut)
    watcher.start()
    try:
        work()
    finally:
        stop.set()
        watcher.join()


def test_the_program_travels_and_runs_with_the_machines_own_python(server: Sshd) -> None:
    about = device_from_url(f"ssh://board{PYTHON}").ask(ABOUT, timeout_s=60)
    assert about["python"] == ".".join(str(v) for v in sys.version_info[:3])
    assert about["runtime"].startswith("onnxruntime ")


@pytest.mark.parametrize(
    ("query", "python"),
    [
        ("", "python3"),
        ("?python=/v/python", "/v/python"),
        ("?python=~/v/python", "./v/python"),
        ("?python=a%20b", "a b"),
    ],
)
def test_the_machines_python_may_be_named(query: str, python: str) -> None:
    assert device_from_url(f"ssh://board{query}").agent() == [python, "-c", archive.START]


def test_a_module_in_the_home_folder_is_not_imported(server: Sshd) -> None:
    shadow = server.folder / "home" / "json.py"
    shadow.write_text("raise SystemExit(99)")
    try:
        assert device_from_url(f"ssh://board{PYTHON}").ask(ABOUT, timeout_s=60)["python"]
    finally:
        shadow.unlink()


def test_a_machine_without_python_or_runtime_says_what_to_install(server: Sshd, tmp_path: Path) -> None:
    with pytest.raises(MissingDependency, match="has no /no/python3") as caught:
        device_from_url("ssh://board?python=/no/python3").ask(ABOUT, timeout_s=60)
    assert caught.value.exit_code == 3
    assert "apt install python3" in caught.value.hint
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E "$@"\n')
    bare.chmod(0o755)
    with pytest.raises(MissingDependency, match="ONNX Runtime can't be imported") as caught:
        device_from_url(f"ssh://board?python={bare}").ask(ABOUT, timeout_s=60)
    assert caught.value.hint == f"on ssh://board: {bare} -m pip install onnxruntime"


def test_a_login_that_greets_does_not_spoil_answers_and_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    greeting = 'ForceCommand echo "Welcome to Linux"; echo "a new mail" >&2; eval "$SSH_ORIGINAL_COMMAND"\n'
    with sshd(tmp_path / "greeting", more=greeting) as server:
        monkeypatch.setenv("PATH", f"{server.bin}:{os.environ['PATH']}")
        device = device_from_url("ssh://board")
        assert device.run(["sh", "-c", "cat; exit 4"], "in", 60)[:2] == (4, "in")
        (tmp_path / "a").write_bytes(b"\n" * 10 + bytes(range(256)))
        with device.folder() as folder:
            device.put(tmp_path / "a", f"{folder}/a")
            device.get(f"{folder}/a", tmp_path / "b")
        assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()


def test_a_login_that_may_run_no_commands_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with sshd(tmp_path / "closed", more="ForceCommand echo This account is closed. >&2; exit 1\n") as server:
        monkeypatch.setenv("PATH", f"{server.bin}:{os.environ['PATH']}")
        with pytest.raises(DeviceError, match="can't be reached: This account is closed"):
            device_from_url("ssh://board").run(["true"], "", 60)


def test_a_full_disk_there_leaves_no_part_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = ["unshare", "--mount", "--propagation", "private", "sh", "-c"]
    small += ['mount -t tmpfs -o size=1m,mode=1777 tmpfs /mnt && exec "$@"', "sh"]
    if (
        os.geteuid() != 0
        or subprocess.run([*small, "true"], capture_output=True, check=False).returncode != 0
    ):
        pytest.skip("only root may mount a small disk")
    (tmp_path / "large").write_bytes(bytes(2_000_000))
    with sshd(tmp_path / "full", environment="TMPDIR=/mnt", start=small) as server:
        monkeypatch.setenv("PATH", f"{server.bin}:{os.environ['PATH']}")
        device = device_from_url("ssh://board")
        with device.folder() as folder:
            with pytest.raises(
                DeviceError, match=r"large \(2\.0 MB\) can't be copied .*No space left"
            ) as caught:
                device.put(tmp_path / "large", f"{folder}/large")
            assert caught.value.hint == "free some space on ssh://board"
            assert device.check(["ls", folder]) == ""
            device.check(["sh", "-c", 'cat /dev/zero >"$1" || true', "sh", f"{folder}/filler"])
            with pytest.raises(DeviceError, match="No space left"):
                device.run(["cat"], "x" * 100_000, 60)


def test_a_profile_is_taken_over_ssh(server: Sshd, tmp_path: Path) -> None:
    """The whole way: the command line, the connection, the program that travels, and its answer."""
    net = write_net(tmp_path / "a net 'q'; $(id).onnx", 8)
    device = f"ssh://board{PYTHON}"
    command = [sys.executable, "-m", "edgeprune", "profile", str(net), "--device", device, "--json"]
    command += ["--set", "measure.iterations=20", "--set", "measure.seconds=1", "--set", "measure.warmup=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    readings = {r["metric"]: r for r in json.loads(done.stdout)["readings"]}
    assert readings["latency_p50"]["value"] > 0
    assert readings["latency_p50"]["where"] == f"ssh://board {os.uname().machine}"
    assert not list(Path(server.folder.parent, "there").iterdir()), "nothing is left there"


def test_a_program_that_is_too_old_to_run_ours_says_so() -> None:
    code = archive.START.replace("(3, 8)", "(9, 9)")
    done = subprocess.run([sys.executable, "-c", code], input="", capture_output=True, text=True, check=False)
    said = json.loads(done.stdout)
    assert (done.returncode, said["kind"]) == (3, "MissingDependency")
    assert "is Python 3." in said["error"]
