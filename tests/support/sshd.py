"""A real sshd on a port of the loopback, with keys for one test run, and the ssh that knows them."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"


@dataclass(frozen=True)
class Sshd:
    """A server that runs. folder: keys and configurations. bin: to be put before PATH; its ssh knows the server."""

    port: int
    folder: Path
    pid: int

    @property
    def bin(self) -> Path:
        return self.folder / "bin"

    @property
    def url(self) -> str:
        return f"ssh://127.0.0.1:{self.port}"

    def cut(self) -> None:
        """End every connection, as when a cable is pulled; the server goes on, and so do the commands it started."""
        for pid in descendants(self.pid):
            with suppress(OSError):
                if Path(f"/proc/{pid}/comm").read_text().strip() != "sshd":
                    continue
                os.kill(pid, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """The processes that a process started, and theirs."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            parents.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, waiting = [], [pid]
    while waiting:
        children = parents.get(waiting.pop(), [])
        found += children
        waiting += children
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def sshd(folder: Path, *, more: str = "", environment: str = "", start: Sequence[str] = ()) -> Iterator[Sshd]:
    """Start a server that lets in this user with a key made for it.

    `more` is added to its configuration; `environment` are words NAME=VALUE for its logins; `start` are words before
    its command line.

    The test is skipped where there is no sshd, or where it can't start.
    """
    if not Path(SSHD).is_file() or not shutil.which("ssh"):
        pytest.skip("no sshd: apt-get install openssh-server openssh-client")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd locks itself in there before it knows who somebody is
    (folder / "bin").mkdir(parents=True)
    (folder / "home").mkdir()
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
    port = free_port()
    host_key = (folder / "host.pub").read_text()
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {host_key}[::1]:{port} {host_key}")
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\n"
        "StrictModes no\nUsePAM no\nPidFile none\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
        f"PermitRootLogin prohibit-password\nMaxStartups 100\nPrintMotd no\n"
        f"SetEnv HOME={folder}/home {environment}\n{more}"
    )
    (folder / "ssh_config").write_text(
        f"Host board\n  HostName 127.0.0.1\n  Port {port}\n"
        f"Host *\n  IdentityFile {folder}/user\n  IdentitiesOnly yes\n  UserKnownHostsFile {folder}/known_hosts\n"
        "  GlobalKnownHostsFile none\n  StrictHostKeyChecking yes\n  IdentityAgent none\n"
    )
    ssh = folder / "bin" / "ssh"
    ssh.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F "{folder}/ssh_config" "$@"\n')
    ssh.chmod(0o755)
    log = folder / "log"
    with log.open("wb") as errors:
        server = subprocess.Popen(
            [*start, SSHD, "-D", "-e", "-f", str(folder / "sshd_config")], stderr=errors
        )
    try:
        _await_port(port, server, log)
        yield Sshd(port, folder, server.pid)
    finally:
        pids = descendants(server.pid)
        server.kill()
        server.wait()
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _await_port(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + 20
    while time.monotonic() < until:
        if server.poll() is not None:
            break
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.02)
    pytest.skip(f"sshd does not start here: {log.read_text().strip()[-300:]}")
