"""The process at this end of a channel: fed, waited for, ended, and its outputs read back from files."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import threading
import time
from typing import IO, NamedTuple

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
