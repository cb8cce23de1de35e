"""A command at the other end of a channel that stays open, and is talked to through the pipes of a process here."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, NamedTuple

from edgeprune.errors import DeviceError

# A keeper that has not heard of us for 90 s (in its script) is taken for dead by the next one.
BEAT_S = 15.0
_HEAD = 2**16
_CHUNK = 2**20


class Ended(NamedTuple):
    """How a command at the other end ended. began: it was started. status: None when its end was not heard of."""

    began: bool
    status: int | None
    start: int
    errors: str


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads a session, with all that it started."""
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait(process: subprocess.Popen[bytes], feed: IO[bytes], timeout_s: float) -> bool:
    """Feed a process and wait for its end; whether that took too long. Its input stays open until then."""
    assert process.stdin is not None
    feeder = threading.Thread(target=_pour, args=(feed, process.stdin), daemon=True)
    late = False
    try:
        feeder.start()
        late = not _ends(process, timeout_s)
    finally:
        # Not its group: what runs at the other end is killed by the shell there, which sees its input end.
        process.kill()
        process.wait()
        feeder.join()
        with contextlib.suppress(OSError):
            process.stdin.close()
    return late


def _ends(process: subprocess.Popen[bytes], timeout_s: float) -> bool:
    """Whether a process ends in time. It sleeps until then, where `Popen.wait` would look 20 times a second."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except (AttributeError, OSError):  # not Linux, or an old one
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout_s)
        return process.returncode is not None
    try:
        watched = select.poll()
        watched.register(descriptor, select.POLLIN)
        return bool(watched.poll(timeout_s * 1000))
    finally:
        os.close(descriptor)


def _pour(feed: IO[bytes], out: IO[bytes]) -> None:
    with contextlib.suppress(OSError):  # the other end is gone; its status says why
        while chunk := feed.read(_CHUNK):
            out.write(chunk)
        out.flush()


def beat(out: IO[bytes], over: threading.Event) -> None:
    """Tell the keeper now and then that we are still there."""
    with contextlib.suppress(OSError):
        while not over.wait(BEAT_S):
            out.write(b"\n")
            out.flush()


def line_with(stream: IO[bytes], token: str, timeout_s: float) -> str:
    """What follows the token in the line that has it; "" when there is none in time."""
    found, until = b"", time.monotonic() + timeout_s
    while (left := until - time.monotonic()) > 0:
        if not select.select([stream], [], [], left)[0]:
            break
        chunk = os.read(stream.fileno(), _HEAD)
        found += chunk
        _, mark, rest = found.partition(token.encode() + b" ")
        if mark and b"\n" in rest:
            return rest.partition(b"\n")[0].decode(errors="replace")
        if not chunk:
            break
    return ""


def read(sink: IO[bytes], errors: str, token: str) -> Ended:
    """Take our marks out of the outputs: the one before the first, the other behind the second."""
    sink.seek(0)
    mark = f"\n{token}\n".encode()
    at = sink.read(_HEAD).find(mark)
    status, said = last(errors, token)
    return Ended(at >= 0, status, at + len(mark), said)


def last(errors: str, token: str) -> tuple[int | None, str]:
    """The status of a command, None when its end was not heard of, and what it said on stderr without our mark."""
    said, end, status = errors.rpartition(f"\n{token} ")
    number = re.match(r"\d{1,3}(?!\d)", status) if end else None
    return (int(number.group()), said) if number else (None, errors)


def text(errors: IO[bytes]) -> str:
    """All that was written to an open file."""
    errors.seek(0)
    return errors.read().decode(errors="replace")


def drop(file: IO[bytes], count: int) -> None:
    """Remove the first bytes of an open file."""
    at = 0
    while True:
        file.seek(at + count)
        chunk = file.read(_CHUNK)
        if not chunk:
            break
        file.seek(at)
        file.write(chunk)
        at += len(chunk)
    file.truncate(at)
    file.flush()


# How long a far machine may take to start a command, to copy a file's last byte to its disk, and to tidy up.
START_S = 60.0
TIDY_S = 15.0
# What a login shell says before a command, or a command that ends with words, in bytes.
_LONGEST_WORDS = 2**16
_LAST = 500

Explain = Callable[[str], tuple[str, str]]


class Answer(NamedTuple):
    """What a command left: exit status (negative: killed by that signal), and its two outputs."""

    status: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class InteractiveCommand:
    """A command at the other end that stays open: bytes are sent to it and it replies with bytes, in turns.

    name, explain: see `Shell`. token: marks the beginning and end of its output. shown: for messages.
    """

    name: str
    explain: Explain
    pipes: Pipes
    errors: IO[bytes]
    token: str
    shown: str

    def greeted(self) -> None:
        """Wait for the mark behind the greetings of a login shell.

        Raises:
            DeviceError: it did not come: the machine can't be reached.
        """
        what, fix = f"no answer in {START_S:g} s", ""
        with contextlib.suppress(TimeoutError):
            if self.pipes.skip(f"\n{self.token}\n".encode(), _LONGEST_WORDS, START_S):
                return
            self.pipes.wait(TIDY_S)
            what, fix = self.explain(text(self.errors))
        raise DeviceError(f"{self.name} can't be reached: {what}", fix)

    def send(self, data: bytes, timeout_s: float) -> None:
        """Tell it something. Where it has ended already, the next `hear` says so."""
        try:
            self.pipes.send(data, timeout_s)
        except TimeoutError as error:
            raise self._late(timeout_s) from error

    def hear(self, count: int, timeout_s: float) -> bytes:
        """So many bytes; fewer only where it has ended."""
        try:
            return self.pipes.receive(count, timeout_s)
        except TimeoutError as error:
            raise self._late(timeout_s) from error

    def end(self) -> Answer:
        """End it: how it ended, with its last words on stdout."""
        self.pipes.hang_up()
        said = self.hear(_LONGEST_WORDS, TIDY_S)
        self.pipes.wait(TIDY_S)
        status, errors = last(text(self.errors), self.token)
        if status is None:
            raise lost(self.name, self.explain, self.shown, errors)
        return Answer(signalled(status), said.decode(errors="replace"), errors)

    def _late(self, timeout_s: float) -> DeviceError:
        stop(self.pipes.process)
        last = text(self.errors).strip()[-_LAST:]
        return DeviceError(
            f"a command on {self.name} did not answer for {timeout_s:g} s and was stopped: {self.shown}; its last "
            f"words: {last or 'none'}",
            "see that nothing else works there, then start again: what was finished is kept",
        )


@dataclass
class Pipes:
    """Both pipes of a process that is talked to in turns: bytes go in while it reads, and come out as they are."""

    process: subprocess.Popen[bytes]
    ahead: bytearray = field(default_factory=bytearray)

    def __post_init__(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self._to, self._from = self.process.stdin.fileno(), self.process.stdout.fileno()
        for descriptor in (self._to, self._from):
            os.set_blocking(descriptor, False)

    def send(self, data: bytes, timeout_s: float) -> bool:
        """Whether all of it was taken; not where nobody reads any more."""
        left, until = memoryview(data), time.monotonic() + timeout_s
        while left:
            _await(self._to, select.POLLOUT, until)
            try:
                left = left[os.write(self._to, left[:_CHUNK]) :]
            except BlockingIOError:
                continue
            except OSError:
                return False
        return True

    def receive(self, count: int, timeout_s: float) -> bytes:
        """So many bytes; fewer only where there come no more."""
        self._fill(lambda: len(self.ahead) >= count, timeout_s)
        return self._take(count)

    def skip(self, mark: bytes, most: int, timeout_s: float) -> bool:
        """Whether a mark came within so many bytes; it is dropped with all that stands before it."""
        self._fill(lambda: mark in self.ahead or len(self.ahead) > most, timeout_s)
        at = self.ahead.find(mark)
        if at >= 0:
            self._take(at + len(mark))
        return at >= 0

    def wait(self, timeout_s: float) -> None:
        """Wait for the end of the process for so long."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout_s)

    def hang_up(self) -> None:
        """End the input of the process."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()

    def end(self, timeout_s: float) -> None:
        """End the process: its input ends, and it is killed if that does not do."""
        assert self.process.stdout is not None
        self.hang_up()
        self.wait(timeout_s)
        stop(self.process)
        self.process.stdout.close()

    def _fill(self, enough: Callable[[], bool], timeout_s: float) -> None:
        until = time.monotonic() + timeout_s
        while not enough():
            _await(self._from, select.POLLIN, until)
            try:
                chunk = os.read(self._from, _CHUNK)
            except BlockingIOError:
                continue
            if not chunk:
                return
            self.ahead += chunk

    def _take(self, count: int) -> bytes:
        found = bytes(self.ahead[:count])
        del self.ahead[:count]
        return found


def _await(descriptor: int, what: int, until: float) -> None:
    """Sleep until a pipe can be used; a pipe with nobody at its other end can."""
    watched = select.poll()
    watched.register(descriptor, what)
    if not watched.poll(max(0.0, until - time.monotonic()) * 1000):
        raise TimeoutError


def lost(name: str, explain: Explain, shown: str, errors: str) -> DeviceError:
    """The error of a connection that ended while a command ran."""
    what, _ = explain(errors)
    return DeviceError(
        f"the connection to {name} was lost while it ran {shown}: {what}",
        "see that it is still on, then start again: what was finished is kept",
    )


def signalled(status: int) -> int:
    """A shell says 128 + n of a command that signal n ended."""
    return 128 - status if 128 < status <= 128 + signal.NSIG else status
