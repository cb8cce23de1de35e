"""Every error a user can meet, and the exit code each one owns.

EdgepruneError                     70 unless a subclass says otherwise
├── UsageError                      2  an option, a recipe or a name is wrong
├── MissingDependency               3  a package is not installed; says the pip line
├── ModelError                      4  the model can't be loaded, traced, cut or exported
│   ├── UnsafeModel                    loading it would run code that nobody allowed
│   ├── UnsupportedModel               it has a part that can't be handled; names the layer
│   └── InfeasibleBudget               no cut of this model meets the budget; says how far it got
├── ParityError                     5  the outputs of an exported or built file differ from its source
├── DeviceError                     6  a device can't be reached, or a command on it failed
│   └── NoLayerTimes                   it gives no times of single layers
└── WorkdirError                    7  the run directory is locked, corrupt or of another model
    └── NoRoom                         a disk is full or can't be written, or memory is exhausted
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
from contextlib import contextmanager
from typing import ClassVar, Iterator, Optional

# What moves the cursor, colors, rings, or turns the direction of text; and halves of pairs, which UTF-8 can't write.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]"
)
_ENDS = re.compile(r"[ \t]*\n\s*")
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
_PATH = (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR)
# torch, ONNX Runtime, C++ and the system have no common class for it.
_MEMORY = re.compile(
    "(can.?t|cannot|unable to|failed to) allocate|not enough memory|out of memory|bad[ _]alloc|MemoryError"
    "|failed to map segment|can't start new thread|thread creation failed"
    "|could not create a (primitive(?! desc)|memory)",  # oneDNN
    re.IGNORECASE,
)
LESS = (
    "free some memory or raise the limit, or let less be in memory at once, as with --set tune.batch=16 or --set "
    "data.calibration=64; the same command goes on after the last finished stage"
)
# Characters of a message; a value of somebody's file may have any number.
_MOST = 2000
ROOM = "make room there, or choose another place with -o or TMPDIR; the same command goes on after the last stage"


class EdgepruneError(Exception):
    """Root of the tree. `hint` is one sentence that says what to do next."""

    exit_code: ClassVar[int] = 70

    def __init__(self, message: str, hint: str = "") -> None:
        self.message, self.hint = line(message), shortened(visible(hint))
        Exception.__init__(self, self.message)
        short = None if isinstance(self, WorkdirError) else shortage(sys.exc_info()[1], self.message)
        if short:
            raise short


class UsageError(EdgepruneError):
    """An option, a recipe, a data set or a name is wrong."""

    exit_code = 2


class MissingDependency(EdgepruneError):
    """A package that this needs is not installed."""

    exit_code = 3


class ModelError(EdgepruneError):
    """The model can't be loaded, traced, cut or exported."""

    exit_code = 4


class UnsafeModel(ModelError):
    """Loading the file would run code, or needs classes that nobody allowed."""


class UnsupportedModel(ModelError):
    """The model has a part that can't be handled; the message names it."""


class InfeasibleBudget(ModelError):
    """No allowed cut of this model meets the budget; the message says how far it got."""


class ParityError(EdgepruneError):
    """The outputs of a file differ from those of the model it was made from; the message says by how much."""

    exit_code = 5


class DeviceError(EdgepruneError):
    """A device can't be reached, took too long, or a command on it failed."""

    exit_code = 6


class NoLayerTimes(DeviceError):
    """A device gives no times of single layers, so that it has no latency table."""


class WorkdirError(EdgepruneError):
    """The run directory is in use, corrupt, or belongs to another model."""

    exit_code = 7


class NoRoom(WorkdirError):
    """A disk is full, read-only or broken, a file may not grow, or memory is exhausted."""


def shortage(error: Optional[BaseException], text: str = "", needed: int = 0) -> Optional[NoRoom]:
    """What an exhausted disk or memory has raised, as the error to raise; None for anything else."""
    if isinstance(error, OSError) and error.errno in _DISK:
        path = os.fspath(error.filename2 or error.filename or "")  # of a copy, where it goes
        text = text or f"{visible(str(path)) or 'a file'} can't be written: {error.strerror}"
        size = f"{needed} bytes are needed, " if needed else ""
        limit = "the limit of ulimit -f is less" if error.errno == errno.EFBIG else _free(path)
        return NoRoom(f"{text}; {size}{limit}", ROOM)
    if isinstance(error, FileNotFoundError) and "No usable temporary directory" in str(error):
        return NoRoom(f"no temporary folder can be written: {error}", ROOM)
    if isinstance(error, MemoryError) or (error and is_memory(str(error))):
        lines = str(error).splitlines()
        return NoRoom(f"out of memory: {text or (lines[0] if lines else 'MemoryError')}", LESS)
    return None


def is_memory(text: str) -> bool:
    """Whether what a library or a process said is that memory is exhausted."""
    return bool(_MEMORY.search(text))


def not_short() -> None:
    """Inside an `except` that would go on another way: not for want of room, or the result would depend on it."""
    short = shortage(sys.exc_info()[1])
    if short:
        raise short


@contextmanager
def translated_os_errors() -> Iterator[None]:
    """Turn what an exhausted disk or memory raises inside into `NoRoom`; also as a decorator.

    What a path raises that the system refuses (too long, a circle of links, forbidden) becomes a `UsageError`.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, EdgepruneError):
            raise
        translated = shortage(error)
        if translated is None and isinstance(error, OSError) and error.filename and error.errno in _PATH:
            translated = UsageError(f"{error.filename} can't be used: {error.strerror}")
        if translated is None:
            raise
        raise translated from error


def shortened(text: str) -> str:
    """Text of any length as a message: at most about 2,000 characters, with how many were left out."""
    half = _MOST // 2 - 20  # what is shortened is never so again
    return text if len(text) <= _MOST else f"{text[:half]} [{len(text) - 2 * half} characters] {text[-half:]}"


def visible(text: str) -> str:
    """Text from anywhere, fit for a terminal, a log and a page: control characters and the like as escapes."""
    return _UNSEEN.sub(lambda found: ascii(found.group())[1:-1], text)


def line(text: str) -> str:
    """Text from anywhere as one line of a message, `visible` and `shortened`; no name in it begins a line."""
    return shortened(_ENDS.sub(" ", visible(text)))


def _free(path: str) -> str:
    folder = path if os.path.isdir(path) else os.path.dirname(path) or "."
    try:
        return f"{shutil.disk_usage(folder).free} bytes are free in {visible(folder)}"
    except OSError:
        return "how many are free is not known"
