"""The way to a shell on a machine: run a command at its end, copy files through it, and keep a folder while it is open.

Everything rests on one fact: when this process ends, in whatever way, the input of what it started there ends too.
So a command that nobody waits for any more is killed, and a keeper removes the folder that it keeps and gives the
machine free. Works with what every small system has: sh, head, cat, wc, mktemp, readlink. Light.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import secrets
import shlex
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from edgeprune.devices.transport import stream
from edgeprune.devices.transport.scripts import GET, KEEP, PUT, RUN, TALK
from edgeprune.devices.transport.stream import (
    START_S,
    TIDY_S,
    Answer,
    Ended,
    InteractiveCommand,
    Pipes,
    lost,
    signalled,
)
from edgeprune.errors import DeviceError

# The slowest way that files are copied over without being given up: bytes in a second.
SLOWEST = 50_000
# What RUN says instead of a status.
NO_ROOM = 999
POLL_S = 1.0
_LAST = 500


class _Held(DeviceError):
    """The machine is in use by somebody else."""


@dataclass(frozen=True)
class Shell:
    """The way to a shell on a machine.

    name: the machine's. attach: argv there -> argv here of a process whose input and outputs are the command's.
    explain: what that process said when it failed -> what is wrong, and what to do.
    """

    name: str
    attach: Callable[[Sequence[str]], list[str]]
    explain: Callable[[str], tuple[str, str]]

    def run(self, argv: Sequence[str], stdin: bytes, timeout_s: float) -> Answer:
        """Run a command there and wait for it; it is killed when the time is up or this process ends."""
        with tempfile.TemporaryFile() as feed, tempfile.TemporaryFile() as sink:
            feed.write(stdin)
            feed.seek(0)
            ended = self._converse([RUN, str(len(stdin)), *argv], argv, feed, sink, timeout_s)
            sink.seek(ended.start)
            if ended.status == NO_ROOM:
                raise self._not_copied(
                    f"the input of {argv[0]} ({len(stdin)} bytes)", self.name, ended.errors
                )
            return Answer(signalled(ended.status or 0), sink.read().decode(errors="replace"), ended.errors)

    @contextmanager
    def talk(self, argv: Sequence[str], shown: str) -> Iterator[InteractiveCommand]:
        """A command there that stays open as long as it reads its input; it ends with it, at the latest with us."""
        token = secrets.token_hex(8)
        command = self.attach(["sh", "-c", TALK, "edgeprune", token, *argv])
        with tempfile.TemporaryFile() as errors:
            pipes = Pipes(self._start(command, argv, subprocess.PIPE, errors))
            try:
                talk = InteractiveCommand(self.name, self.explain, pipes, errors, token, shown)
                talk.greeted()
                yield talk
            finally:
                pipes.end(TIDY_S)

    def put(self, here: Path, there: str) -> None:
        """Copy a file to the machine; it appears there whole or not at all."""
        try:
            with here.open("rb") as feed, tempfile.TemporaryFile() as sink:
                size = os.fstat(feed.fileno()).st_size
                what = ["put", there]
                ended = self._converse([PUT, str(size), there], what, feed, sink, START_S + size / SLOWEST)
        except OSError as error:
            raise DeviceError(f"{here} can't be copied to {self.name}: {error}") from error
        if ended.status:
            raise self._not_copied(f"{here} ({size / 1e6:.1f} MB)", there, ended.errors)

    def get(self, there: str, here: Path) -> None:
        """Copy a file from the machine; it appears here whole or not at all."""
        part = here.with_name(here.name + ".part")
        try:
            size = self._size(there)
            with tempfile.TemporaryFile() as feed, part.open("w+b") as sink:
                ended = self._converse(
                    [GET, "0", there], ["get", there], feed, sink, START_S + size / SLOWEST
                )
                if ended.status:
                    raise self._not_copied(f"{there} on {self.name}", str(here), ended.errors)
                stream.drop(sink, ended.start)
                if os.fstat(sink.fileno()).st_size != size:
                    found = os.fstat(sink.fileno()).st_size
                    raise DeviceError(f"of {there} on {self.name}, {size} bytes, {found} bytes arrived")
            part.replace(here)
        except OSError as error:
            raise DeviceError(f"{there} on {self.name} can't be copied to {here}: {error}") from error
        finally:
            part.unlink(missing_ok=True)

    @contextmanager
    def keep(self, holder: str = "") -> Iterator[str]:
        """A new empty folder there, gone with all that is in it afterwards, even if this process is killed."""
        token = secrets.token_hex(8)
        command = self.attach(["sh", "-c", KEEP, "edgeprune-keeper", token, holder])
        with tempfile.TemporaryFile() as errors:
            process = self._start(command, ["sh", "(keeper)"], subprocess.PIPE, errors)
            assert process.stdin is not None and process.stdout is not None
            over = threading.Event()
            beating = threading.Thread(target=stream.beat, args=(process.stdin, over), daemon=True)
            try:
                yield self._kept(process, token, errors, beating)
            finally:
                over.set()
                if beating.ident is not None:
                    beating.join()
                with contextlib.suppress(OSError):
                    process.stdin.close()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(TIDY_S)
                process.stdout.close()
                process.kill()
                process.wait()

    @contextmanager
    def alone(self, wait_s: float, log: Callable[[str], None]) -> Iterator[None]:
        """Be the only one of those who ask for it; what one who is killed held is free at once."""
        until, told = time.monotonic() + wait_s, False
        with contextlib.ExitStack() as stack:
            while True:
                try:
                    stack.enter_context(self.keep(_myself()))
                    break
                except _Held as held:
                    if time.monotonic() >= until:
                        raise
                    if not told:
                        log(f"{held.message}; waiting up to {wait_s:g} s")
                    told = True
                    time.sleep(POLL_S)
            yield

    def _kept(
        self, process: subprocess.Popen[bytes], token: str, errors: IO[bytes], beating: threading.Thread
    ) -> str:
        assert process.stdout is not None
        said = stream.line_with(process.stdout, token, START_S)
        kind, _, rest = said.partition(" ")
        if kind == "folder":
            beating.start()
            return rest
        if kind == "held":
            raise _Held(
                f"{self.name} is in use: {rest}", "wait until it is done, or measure on another device"
            )
        last = stream.text(errors)
        if kind == "failed":
            raise DeviceError(f"no folder can be made on {self.name}: {rest or last}", "is there space left?")
        what, fix = self.explain(last)
        raise DeviceError(f"{self.name} can't be reached: {what}", fix)

    def _converse(
        self, script: Sequence[str], argv: Sequence[str], feed: IO[bytes], sink: IO[bytes], timeout_s: float
    ) -> Ended:
        token = secrets.token_hex(8)
        command = self.attach(["sh", "-c", script[0], "edgeprune", token, *script[1:]])
        shown = _shown(argv)
        with tempfile.TemporaryFile() as errors:
            process = self._start(command, argv, sink, errors)
            late = stream.wait(process, feed, timeout_s)
            ended = stream.read(sink, stream.text(errors), token)
        if ended.status is not None and not late:
            return ended
        last = ended.errors.strip()[-_LAST:]
        if late and ended.began:
            raise DeviceError(
                f"a command on {self.name} took longer than {timeout_s:g} s and was stopped: {shown}; "
                f"its last words: {last or 'none'}",
                "time fewer iterations, as with --set measure.iterations=20",
            )
        what, fix = self.explain(ended.errors)
        if not ended.began:
            what = f"no answer in {timeout_s:g} s" if late else what
            raise DeviceError(f"{self.name} can't be reached: {what}", fix)
        raise lost(self.name, self.explain, shown, ended.errors)

    def _start(
        self, command: Sequence[str], argv: Sequence[str], out: IO[bytes] | int, errors: IO[bytes]
    ) -> subprocess.Popen[bytes]:
        """A process of its own session: Ctrl-C is for us, and we end it."""
        try:
            return subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=out, stderr=errors, start_new_session=True
            )
        except OSError as error:
            what, fix = self.explain(str(error))
            raise DeviceError(
                f"a command on {self.name} can't be started: {_shown(argv)}: {what}", fix
            ) from error

    def _size(self, there: str) -> int:
        answer = self.run(["sh", "-c", 'wc -c <"$1"', "sh", there], b"", START_S)
        size = size_in(answer.stdout)
        if answer.status != 0 or size is None:
            raise DeviceError(f"{there} on {self.name} can't be read: {answer.stderr.strip()[-_LAST:]}")
        return size

    def _not_copied(self, what: str, where: str, errors: str) -> DeviceError:
        last = " | ".join(errors.strip().splitlines()[-3:])
        full = "No space left" in errors or "Disk quota" in errors
        hint = f"free some space on {self.name}" if full else "is there space left?"
        return DeviceError(f"{what} can't be copied to {where}: {last or 'it did not arrive whole'}", hint)


def size_in(said: str) -> int | None:
    """The bytes that `wc -c` said; None where it said something else."""
    return int(said) if re.fullmatch(r"\s*\d{1,15}\s*", said) else None


def _shown(argv: Sequence[str]) -> str:
    return " ".join("(script)" if "\n" in word or len(word) > _LAST else shlex.quote(word) for word in argv)


def _myself() -> str:
    user = str(os.getuid())
    with contextlib.suppress(KeyError, OSError, ImportError):  # a user without a name
        user = getpass.getuser()
    since = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return f"by {user} on {socket.gethostname()}, process {os.getpid()}, since {since}"
