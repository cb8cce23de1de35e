"""Records to JSON and back, strict, so that a foreign file is refused with the field's name; and how files are written.

A file or a folder appears whole or not at all, also when the power fails. What a killed process leaves under another
name is removed by the next one (`sweep`), which knows by a lock that the process runs no more.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import math
import os
import shutil
import stat
import tempfile
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, Optional, Tuple, Type, TypeVar, Union, get_type_hints

from edgeprune.errors import DeviceError, EdgepruneError, UsageError, WorkdirError, shortage

T = TypeVar("T")
DEEPEST = 64
# Bytes of a file: a report of thousands of layers has a hundredth of it.
LARGEST = 2**28
# Digits of a whole number, which a float holds.
LONGEST = 300
LEFT_FILES = "*.[0-9]*.tmp"
_SCRATCH = "edgeprune-work-"


def to_json(value: Any) -> Any:
    """A record, or a nest of them, as dicts, lists, strings, numbers and None. Infinities and NaN become None."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def from_json(cls: Type[T], data: Any, where: str = "") -> T:
    """Build a record of type `cls` from what `to_json` gave."""
    return _decode(cls, data, where or cls.__name__)


def write(path: Path, value: Any) -> None:
    """Write a record as indented JSON, whole or not at all."""
    with replace_file(path) as file:
        file.write((json.dumps(to_json(value), indent=1, allow_nan=False) + "\n").encode())


def parse(text: str) -> Any:
    """Parse a foreign JSON text; a ValueError also for a key twice in one object, a number that no float holds, half a
    surrogate pair, and more than DEEPEST levels.
    """
    try:
        data = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite, parse_int=_whole
        )
    except RecursionError as error:
        raise ValueError(f"it is nested deeper than {DEEPEST} levels") from error
    level, depth = [data], 0
    while level:
        level = [
            v
            for d in level
            if isinstance(d, (dict, list))
            for v in (d.values() if isinstance(d, dict) else d)
        ]
        depth += 1
    if depth > DEEPEST:
        raise ValueError(f"it is nested deeper than {DEEPEST} levels")
    # Half a surrogate pair is legal in a JSON escape and can't be written to any output.
    json.dumps(data, ensure_ascii=False).encode("utf-8")
    return data


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    hasher = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(2**20):
            hasher.update(block)
    return hasher.hexdigest()


def load(path: Path) -> Any:
    """`parse` of a file."""
    about = path.stat()
    if not stat.S_ISREG(about.st_mode) or about.st_size > LARGEST:
        raise ValueError(f"it is no file of at most {LARGEST} bytes")
    return parse(path.read_text(encoding="utf-8"))


def read(cls: Type[T], path: Path, error: Type[EdgepruneError] = UsageError) -> T:
    """Read a record from a JSON file."""
    try:
        data = load(path)
    except (OSError, ValueError) as cause:
        raise error(f"{path} is not a readable JSON file: {cause}") from cause
    try:
        return from_json(cls, data)
    except UsageError as cause:
        raise error(f"{path} is not a {cls.__name__.lower()}: {cause.message}") from cause


def _unique(pairs: Any) -> Any:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise ValueError(f"the key {twice!r:.80} stands twice in one object")
    return found


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text:.40} is not a finite number")
    return number


def _whole(text: str) -> int:
    if len(text) > LONGEST:
        raise ValueError(f"a whole number of {len(text)} digits is more than a number here can be")
    return int(text)


@contextmanager
def replace_file(path: Path) -> Iterator[io.BytesIO]:
    """A buffer that becomes the file when the block ends without an error, whole or not at all.

    In memory first, so that nobody else's writer meets a full disk, and the size is known that is needed.
    """
    buffer = io.BytesIO()
    yield buffer
    data = buffer.getbuffer()

    def create() -> Path:
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        temporary.touch()
        return temporary

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _owned(create) as temporary, temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        text = f"{path} can't be written: {error.strerror or error}"
        error.filename = error.filename or str(path)
        raise shortage(error, text, len(data)) or WorkdirError(text, "choose another place") from error


@contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside `path` that becomes it when the block ends without an error, whole or not at all."""
    unfinished = path.with_name(f"tmp-{path.name}")
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        for entry in (*unfinished.rglob("*"), unfinished):
            _sync(entry)
        os.replace(unfinished, path)
        _sync(path.parent)
        _sync(path.parent.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def scratch_folder(inside: Optional[Path] = None) -> Iterator[Path]:
    """A new empty folder, gone afterwards; where this process is killed, the next one that makes one removes it."""
    sweep(inside or Path(tempfile.gettempdir()), f"{_SCRATCH}*")
    with _owned(lambda: Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=inside))) as folder:
        yield folder


def sweep(folder: Path, pattern: str) -> None:
    """Remove what killed processes of this user have left there of `replace_file` or `scratch_folder`."""
    for left in folder.glob(pattern):
        with suppress(OSError):
            held = os.open(left, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(held).st_uid == os.getuid():
                    _remove(left)
            finally:
                os.close(held)


@contextmanager
def _owned(create: Callable[[], Path]) -> Iterator[Path]:
    path, held = _locked(create)
    try:
        yield path
    finally:
        _remove(path)
        os.close(held)


def _locked(create: Callable[[], Path]) -> Tuple[Path, int]:
    while True:
        path = create()
        with suppress(FileNotFoundError):
            held = os.open(path, os.O_RDONLY)
            fcntl.flock(held, fcntl.LOCK_EX)
            if path.exists():  # `sweep` may have been quicker than the lock
                return path, held
            os.close(held)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _decode(hint: Any, data: Any, where: str) -> Any:
    origin = getattr(hint, "__origin__", None)
    if hint is Any:
        return data
    if is_dataclass(hint):
        return _record(hint, data, where)
    if origin is Union:
        return None if data is None else _decode(hint.__args__[0], data, where)
    if origin is tuple:
        return _tuple(hint.__args__, data, where)
    if origin is not None:
        if not isinstance(data, Mapping):
            raise UsageError(f"{where} must be an object, found {_kind(data)}")
        return {k: _decode(hint.__args__[1], v, f"{where}.{k}") for k, v in data.items()}
    return _scalar(hint, data, where)


def _record(cls: Any, data: Any, where: str) -> Any:
    if not isinstance(data, Mapping):
        raise UsageError(f"{where} must be an object, found {_kind(data)}")
    hints = get_type_hints(cls)
    unknown = sorted(set(data) - set(hints))
    if unknown:
        raise UsageError(f"{where} has an unknown field {unknown[0]!r}")
    values = {}
    for item in fields(cls):
        if item.name in data:
            values[item.name] = _decode(hints[item.name], data[item.name], f"{where}.{item.name}")
    try:
        return cls(**values)
    except TypeError as error:
        raise UsageError(f"{where}: {str(error).split('__init__() ')[-1]}") from error
    except DeviceError as error:  # a reading that can't be one
        raise UsageError(f"{where}: {error.message}") from error


def _tuple(args: Any, data: Any, where: str) -> Any:
    if not isinstance(data, (list, tuple)):
        raise UsageError(f"{where} must be a list, found {_kind(data)}")
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(_decode(args[0], v, f"{where}[{i}]") for i, v in enumerate(data))
    if len(args) != len(data):
        raise UsageError(f"{where} must have {len(args)} values, found {len(data)}")
    return tuple(_decode(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(args, data)))


def _scalar(kind: Any, data: Any, where: str) -> Any:
    good = isinstance(data, (int, float) if kind is float else kind) and (
        kind is bool or not isinstance(data, bool)
    )
    if not good:
        raise UsageError(f"{where} must be a {kind.__name__}, found {_kind(data)}")
    if kind is float and not abs(data) < math.inf:
        raise UsageError(f"{where} must be a finite number, found {_kind(data)}")
    try:
        return kind(data)
    except OverflowError as error:  # a whole number of more than 308 digits
        raise UsageError(f"{where} must be a finite number, found {_kind(data)}") from error


def _kind(data: Any) -> str:
    return "nothing" if data is None else f"{type(data).__name__} {data!r:.40}"
