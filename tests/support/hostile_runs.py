"""One command in a process of its own, inside a folder of its own, and what is wrong with how it ended."""

from __future__ import annotations

import os
import re
import resource
import select
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REFUSED = frozenset({0, 2, 4, 7})
LIMIT_S = 60.0
# What the payloads in files do when somebody runs them; both names are what a test looks for.
CANARY = "canary"
# More than torch and ONNX Runtime take for small networks, and less than what machines that run tests have.
MEMORY = 4 * 2**30
LONGEST_LINE = 10_000
# Where a command may write: its output, its temporary folder, the folder of its key.
WRITABLE = ("out", "runs", "tmp", "config")
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# The audited events that change the disk, and which of their arguments are paths.
_CHANGES = {
    "os.mkdir": (0,), "os.rename": (0, 1), "os.remove": (0,), "os.rmdir": (0,), "os.symlink": (1,), "os.link": (1,),
}  # fmt: skip


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code (negative: killed by that signal), its output, and its time."""

    code: int
    output: str
    seconds: float
    written: tuple[str, ...]
    canary: bool

    def faults(self, allowed: frozenset[int]) -> list[str]:
        """What must not be, in words; empty when all is well."""
        found = {
            f"exit {self.code}": self.code not in allowed,
            f"over {LIMIT_S:g} s": self.seconds > LIMIT_S,
            f"written outside: {', '.join(self.written)}": bool(self.written),
            "code ran": self.canary,
        }
        return [*(name for name, holds in found.items() if holds), *self.shows_too_much()]

    def shows_too_much(self) -> list[str]:
        """What must not be in the output."""
        longest = max(map(len, self.output.splitlines()), default=0)
        found = {
            "a traceback": "Traceback (most recent call last)" in self.output,
            "control characters": bool(_CONTROL.search(self.output)),
            f"a line of {longest} characters": longest > LONGEST_LINE,
        }
        return [name for name, holds in found.items() if holds]


def run(argv: Sequence[str], folder: Path) -> Ended:
    """Run `edgeprune ARGV...` in the folder, in a fork of this process: nothing that it does is left in this one."""
    before = _listing(folder)
    log, writes = folder / "tmp" / "output", folder / "tmp" / "writes"
    log.parent.mkdir(exist_ok=True)
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        _child(list(argv), folder, log, writes)
    code = _wait(child, LIMIT_S)
    seconds = time.monotonic() - began
    written = writes.read_text("utf-8", "replace").splitlines() if writes.exists() else []
    changed = [name for name, facts in _listing(folder).items() if before.get(name) != facts]
    gone = [name for name in before if not os.path.lexists(folder / name)]
    canary = os.path.lexists(folder / CANARY)
    return Ended(
        code, log.read_text("utf-8", "backslashreplace"), seconds, tuple([*written, *changed, *gone]), canary
    )


def _child(argv: list[str], folder: Path, log: Path, writes: Path) -> None:
    status = 99
    try:
        os.setsid()  # what the command starts goes with it
        _redirect(log)
        os.chdir(folder)
        os.environ.update(
            TMPDIR=str(folder / "tmp"), XDG_CONFIG_HOME=str(folder / "config"), HOME=str(folder / "tmp")
        )
        import tempfile

        tempfile.tempdir = None
        sys.dont_write_bytecode = True
        warnings.resetwarnings()  # as a command has them, not as tests do
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        _watch(folder, os.open(writes, os.O_CREAT | os.O_WRONLY | os.O_APPEND))
        status = _main(argv)
        if CANARY in os.environ or CANARY in vars(sys):
            (folder / CANARY).touch()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _redirect(log: Path) -> None:
    target = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(target, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)


def _main(argv: list[str]) -> int:
    from edgeprune.cli import app as cli

    sys.argv = ["edgeprune", *argv]
    try:
        cli.main()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 99
    return 99


def _watch(folder: Path, report: int) -> None:
    """Write down every change outside of the folders where changes are allowed."""
    allowed = (*(str(folder / name) for name in WRITABLE), "/dev/null", "/dev/shm/", "/proc/self/")

    def told(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            flags = arguments[2] if isinstance(arguments[2], int) else 0
            paths = arguments[:1] if flags & _WRITES else ()
        else:
            inside = arguments[-1:] != (-1,)  # relative to a folder that was opened before
            paths = [] if inside else [arguments[i] for i in _CHANGES.get(event, ())]
        for path in paths:
            if isinstance(path, (str, bytes, os.PathLike)):
                # not realpath: it would be audited again, and nothing here makes links in the allowed folders
                full = os.path.abspath(os.fsdecode(path))
                if not full.startswith(allowed):
                    os.write(report, f"{event} {full!a}\n".encode())

    sys.addaudithook(told)


def _wait(child: int, limit_s: float) -> int:
    handle = os.pidfd_open(child)
    try:
        if not select.select([handle], [], [], limit_s)[0]:
            os.killpg(child, signal.SIGKILL)
            time.sleep(0.01)
    finally:
        os.close(handle)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def _listing(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Every path below the folder, but for where changes are allowed, with size, time and kind."""
    found: dict[str, tuple[int, int, int]] = {}
    for root, folders, files in os.walk(folder):
        inside = os.path.relpath(root, folder)
        if inside == ".":
            folders[:] = [name for name in folders if name not in WRITABLE]
        for name in [*folders, *files]:
            facts = os.lstat(os.path.join(root, name))
            stamp = 0 if name in folders else facts.st_mtime_ns
            found[os.path.normpath(os.path.join(inside, name))] = (facts.st_size, stamp, facts.st_mode)
    return found
