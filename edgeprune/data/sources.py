"""The image files in a folder or a tar: listed or read into memory, never unpacked to disk."""

import bz2
import gzip
import hashlib
import io
import lzma
import math
import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from lzma import LZMAError
from pathlib import Path
from tokenize import TokenError
from typing import IO

import numpy as np
from numpy.lib import format as npy

from edgeprune.data.images import MAX_FILE_BYTES, SUFFIXES, ImageFile
from edgeprune.errors import ModelError, UsageError
from edgeprune.progress import bar
from edgeprune.serialization import sha256

TAR_MAX_BYTES = 8 * 2**30
# Images are compressed already: what unpacks to more than so many times its size, and to more than a little, is a bomb.
MOST_TIMES = 500
LITTLE_BYTES = 2**20
BROKEN_TAR = (tarfile.TarError, OSError, EOFError, lzma.LZMAError, zlib.error, MemoryError, ValueError)
UNPACK = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open, b"\x5d\x00\x00": lzma.open}
DEEPEST = 32
# What operating systems put beside the files of people.
SYSTEM = ("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "__pycache__")

Parts = tuple[str, ...]


@dataclass(frozen=True)
class Found:
    """What a folder or tar holds; what operating systems put there, and hidden files, are left out.

    files: the images in the order of their names. folders: every folder, as the parts of its path.
    passed: what is passed over by kind (an ending, a link, ...): how many, and the name of the first.
    fingerprint: sha256 (hex), another one when something changed.
    """

    files: tuple[ImageFile, ...]
    folders: frozenset[Parts]
    passed: Mapping[str, tuple[int, str]]
    fingerprint: str


class _Passed(dict[str, tuple[int, str]]):
    """Found.passed, as it grows."""

    def add(self, kind: str, name: str) -> None:
        count, first = self.get(kind, (0, name))
        self[kind] = (count + 1, first)

    def add_file(self, parts: Parts) -> None:
        """A file that is no image by its name; hidden ones only where they would be one if they were not hidden."""
        name = parts[-1].lower()
        if not _hidden(parts):
            ending = name.rpartition(".")[2] if "." in name else ""
            plain = ending.isalnum() and ending.isascii()
            self.add(f".{ending} file" if plain else "file without an ending", "/".join(parts))
        elif name.endswith(SUFFIXES) and not _of_system(parts):
            self.add("hidden image", "/".join(parts))


def from_folder(root: Path) -> Found:
    """List a folder; the images are read later. The fingerprint covers names, sizes and times of change."""
    files: list[ImageFile] = []
    folders: set[Parts] = set()
    digest, passed = hashlib.sha256(), _Passed()
    try:
        status = root.stat()
        for parts, entry in _walk(root, (), frozenset({(status.st_dev, status.st_ino)}), passed):
            if entry.is_dir():
                folders.add(parts)
            elif _is_image(parts):
                name, status = "/".join(parts), entry.stat()
                digest.update(
                    f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode("utf-8", "surrogateescape")
                )
                files.append(ImageFile(name, Path(entry.path)))
            else:
                passed.add_file(parts)
    except OSError as error:
        raise UsageError(f"folder {str(root)!r} can't be read: {error}") from error
    return Found(tuple(files), _visible(folders), passed, digest.hexdigest())


def from_tar(path: Path) -> Found:
    """Read the image files of a tar into memory, not decoded. The fingerprint is the sha256 of the tar.

    Symbolic links, devices, sparse files and names that are absolute or climb with ".." are passed over.
    """
    files: dict[str, ImageFile] = {}
    folders: set[Parts] = set()
    passed = _Passed()
    try:
        for parts, content in _members(path, passed):
            folders.update(parts[:i] for i in range(1, len(parts)))
            if content is None:
                folders.add(parts)
            else:
                files["/".join(parts)] = ImageFile("/".join(parts), content)
    except BROKEN_TAR as error:
        hint = "make it again: tar -cJf data.tar.xz FOLDER"
        raise UsageError(
            f"{path} can't be read as a tar: {str(error) or type(error).__name__}", hint
        ) from error
    ordered = tuple(files[name] for name in sorted(files))
    return Found(ordered, _visible(folders), passed, sha256(path))


def most_bytes(size: int) -> int:
    """What a compressed file of so many bytes may unpack to."""
    return max(LITTLE_BYTES, MOST_TIMES * size)


def bomb(path: Path) -> UsageError:
    """What is raised for a file that unpacks to more."""
    found = f"{path} has {path.stat().st_size} bytes and unpacks to more than {MOST_TIMES} times as many"
    return UsageError(found, "images don't compress so far; if you trust the file, unpack it yourself")


class _Unpacked:
    def __init__(self, path: Path, stream: IO[bytes]) -> None:
        self._path, self._stream, self._limit = path, stream, most_bytes(path.stat().st_size)

    def read(self, size: int) -> bytes:
        content = self._stream.read(min(size, self._limit + 1))
        self._check(self._stream.tell())
        return content

    def seek(self, position: int) -> None:
        self._check(position)
        self._stream.seek(position)

    def tell(self) -> int:
        return self._stream.tell()

    def _check(self, position: int) -> None:
        if position > self._limit:
            raise bomb(self._path)


def _opened(path: Path, raw: IO[bytes]) -> tarfile.TarFile:
    first = raw.read(8)
    raw.seek(0)
    unpack = next((opener for magic, opener in UNPACK.items() if first.startswith(magic)), None)
    stream = _Unpacked(path, unpack(raw)) if unpack else raw  # type: ignore[operator]
    return tarfile.open(fileobj=stream, mode="r:")  # type: ignore[call-overload]


def _members(path: Path, passed: _Passed) -> Iterator[tuple[Parts, bytes | None]]:
    total = position = 0
    read: dict[str, bytes] = {}
    with (
        path.open("rb") as raw,
        _opened(path, raw) as archive,
        bar(path.stat().st_size // 1000, f"reading {path.name} (kB)") as advance,
    ):
        for member in archive:
            if member.size < 0:
                raise tarfile.ReadError(f"{member.name!r} has {member.size} bytes")
            parts = _safe_parts(member.name)
            if member.isdir():
                if parts:
                    yield parts, None
                continue
            # tar writes a file that it meets again as a hard link to the first.
            content = read.get("/".join(_safe_parts(member.linkname))) if member.islnk() else None
            if not parts:
                passed.add("name outside of the tar", member.name)
            elif content is None and (not member.isfile() or member.issparse()):
                passed.add("link, device or sparse file", member.name)
            elif not _is_image(parts):
                passed.add_file(parts)
            else:
                if content is None:
                    total += member.size
                    _check_size(path, member, total)
                    stream = archive.extractfile(member)
                    content = stream.read() if stream else b""
                read["/".join(parts)] = content
                yield parts, content
            advance(raw.tell() // 1000 - position)
            position = raw.tell() // 1000
        _check_end(archive)


def _check_size(path: Path, member: tarfile.TarInfo, total: int) -> None:
    if member.size > MAX_FILE_BYTES:
        raise UsageError(
            f"{path}: image {member.name!r} has {member.size} bytes, at most {MAX_FILE_BYTES} is accepted"
        )
    if total > TAR_MAX_BYTES:
        raise UsageError(
            f"{path} holds more than {TAR_MAX_BYTES} bytes of images", "unpack it and give the folder"
        )


def _check_end(archive: tarfile.TarFile) -> None:
    """A tar ends with zeros; tarfile itself takes a damaged or missing header for the end."""
    stream = archive.fileobj
    if stream is None:
        return
    stream.seek(archive.offset)
    if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"it is cut short or damaged at byte {archive.offset} of its content")
    while stream.read(2**20):
        # To the end, where the compressed formats have their checksums.
        pass


def _walk(
    folder: Path, parts: Parts, seen: frozenset[tuple[int, int]], passed: _Passed
) -> Iterator[tuple[Parts, os.DirEntry[str]]]:
    """Folders and regular files below, in the order of their names; links are followed, never in a circle."""
    with os.scandir(folder) as entries:
        ordered = sorted(entries, key=lambda e: e.name)
    for entry in ordered:
        inner = (*parts, entry.name)
        try:
            status = entry.stat()
        except OSError:
            passed.add("broken link", "/".join(inner))
            continue
        if entry.is_dir():
            key = (status.st_dev, status.st_ino)
            if key in seen or len(inner) >= DEEPEST:
                passed.add("folder too deep" if key not in seen else "link in a circle", "/".join(inner))
            else:
                yield inner, entry
                yield from _walk(Path(entry.path), inner, seen | {key}, passed)
        elif entry.is_file():
            yield inner, entry
        else:
            passed.add("device or pipe", "/".join(inner))


def _safe_parts(name: str) -> Parts:
    parts = tuple(p for p in name.split("/") if p not in ("", "."))
    return () if name.startswith("/") or ".." in parts or len(parts) > DEEPEST else parts


def _is_image(parts: Parts) -> bool:
    return parts[-1].lower().endswith(SUFFIXES) and not _hidden(parts)


def _hidden(parts: Parts) -> bool:
    return _of_system(parts) or any(part.startswith(".") for part in parts)


def _of_system(parts: Parts) -> bool:
    return any(part.startswith("._") or part.lower() in SYSTEM for part in parts)


def _visible(folders: set[Parts]) -> frozenset[Parts]:
    return frozenset(parts for parts in folders if not _hidden(parts))


SETS = {"": "", "_train": "train", "_val": "val", "_test": "test"}
ACCEPTED = (
    "accepted: x uint8 (N, H, W, C) or (N, H, W) and y integer (N,), or x_train, y_train, x_test, y_test"
)
ENDING = ".npy"
HEADER_BYTES = 16384
PIECE_BYTES = 2**20
HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
# What zipfile and numpy raise on files of another kind; an encrypted member is a RuntimeError.
BROKEN_NPZ = (
    *(OSError, ValueError, EOFError, KeyError, TypeError, SyntaxError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error, LZMAError, TokenError),
)


@dataclass(frozen=True)
class Arrays:
    """One part: x uint8 (N, H, W, C), C being 1 when the file has no such axis, and y int64 (N,)."""

    x: np.ndarray
    y: np.ndarray


def read(path: Path, skip: tuple[str, ...] = ()) -> tuple[dict[str, Arrays], tuple[str, ...]]:
    """The parts in a file by name ("train", "val", "test", or "" for a set without a split), and notes.

    Parts named in `skip` are left unread if there is another one.
    """
    try:
        with zipfile.ZipFile(path) as file:
            if sum(member.file_size for member in file.infolist()) > most_bytes(path.stat().st_size):
                raise bomb(path)
            names = [name.removesuffix(ENDING) for name in file.namelist()]
            found = {p: s for s, p in SETS.items() if "x" + s in names or "y" + s in names}
            if not found:
                raise UsageError(f"{path} holds {_listed(names) or 'nothing'}, but no x and y", ACCEPTED)
            if "" in found and len(found) > 1:
                raise UsageError(f"{path} holds {_listed(names)}: x and y or parts, not both", ACCEPTED)
            wanted = {part: suffix for part, suffix in found.items() if part not in skip} or found
            parts = {part: _part(path, file, suffix) for part, suffix in wanted.items()}
    except BROKEN_NPZ as error:
        raise UsageError(
            f"{path} can't be read as .npz: {str(error) or type(error).__name__}", ACCEPTED
        ) from error
    unused = sorted(set(names) - {axis + suffix for suffix in found.values() for axis in "xy"})
    return parts, ((f"arrays ignored: {_listed(unused)}",) if unused else ())


def _listed(names: Sequence[str]) -> str:
    shown = [name if name.isidentifier() else repr(name) for name in names[:12]]
    return ", ".join(shown) + (", ..." if len(names) > len(shown) else "")


def _part(path: Path, file: zipfile.ZipFile, suffix: str) -> Arrays:
    held = {name.removesuffix(ENDING): name for name in file.namelist()}
    for name in ("x" + suffix, "y" + suffix):
        if name not in held:
            raise UsageError(f"{path} has no {name!r}, it holds {_listed(list(held))}", ACCEPTED)
    x, y = (
        _array(f"{path}: {name}", _content(path, file, held[name])) for name in ("x" + suffix, "y" + suffix)
    )
    x = _pixels(f"{path}: x{suffix}", x)
    return Arrays(x, _labels(f"{path}: y{suffix}", y, len(x)))


def _content(path: Path, file: zipfile.ZipFile, name: str) -> bytearray:
    content, size = bytearray(), file.getinfo(name).file_size
    try:
        with file.open(name) as stream:
            while piece := stream.read(PIECE_BYTES):
                content += piece
        if len(content) < size:
            raise EOFError(f"it has {len(content)} of {size} bytes")
    except (zipfile.BadZipFile, zlib.error, LZMAError, EOFError, OSError) as error:
        hint = "the file was changed or cut short: copy or make it again"
        raise ModelError(f"{path}: member {name!r} is damaged: {error}", hint) from error
    return content


def _array(where: str, content: bytearray) -> np.ndarray:
    start = io.BytesIO(content[:HEADER_BYTES])
    try:
        version = npy.read_magic(start)
        if version not in HEADERS:
            raise ValueError(f"its .npy format is {version[0]}.{version[1]}, accepted are 1.0 and 2.0")
        shape, fortran, dtype = HEADERS[version](start)
    except (*BROKEN_NPZ, MemoryError) as error:  # the latter for brackets that are nested too deep
        raise UsageError(f"{where} is no array: {error}", ACCEPTED) from error
    if dtype.kind not in "biuf":
        objects = ", and nothing is unpickled" * dtype.hasobject
        raise UsageError(f"{where} is {dtype}, accepted are whole numbers{objects}", ACCEPTED)
    size, left = math.prod(shape) * dtype.itemsize, len(content) - start.tell()
    if size != left or min(shape, default=0) < 0:
        raise UsageError(f"{where} says {dtype} {shape}, which is {size} bytes, and holds {left}", ACCEPTED)
    flat = np.frombuffer(content, np.uint8, offset=start.tell()).view(dtype)
    return flat.reshape(shape[::-1]).T if fortran else flat.reshape(shape)


def _pixels(where: str, x: np.ndarray) -> np.ndarray:
    if np.issubdtype(x.dtype, np.floating):
        bad = int((~np.isfinite(x)).sum())
        if bad:
            raise UsageError(f"{where} is {x.dtype} and has {bad} values that are NaN or infinite", ACCEPTED)
        how = "save pixels in 0..255; if x is in [0, 1]: x = (x * 255).round().astype('uint8')"
        raise UsageError(
            f"{where} is {x.dtype} in [{x.min(initial=0):g}, {x.max(initial=0):g}], accepted is uint8", how
        )
    if x.dtype != np.uint8:
        raise UsageError(
            f"{where} is {x.dtype}, accepted is uint8", "save pixels in 0..255: x = x.astype('uint8')"
        )
    if x.ndim not in (3, 4) or 0 in x.shape:
        raise UsageError(f"{where} has shape {x.shape}, accepted are (N, H, W, C) and (N, H, W)", ACCEPTED)
    if x.ndim == 4 and x.shape[1] in (1, 3) and x.shape[3] not in (1, 3, 4):
        raise UsageError(
            f"{where} has shape {x.shape}, which looks like (N, C, H, W)", "save x.transpose(0, 2, 3, 1)"
        )
    return x[..., None] if x.ndim == 3 else x


def _labels(where: str, y: np.ndarray, count: int) -> np.ndarray:
    if not np.issubdtype(y.dtype, np.integer):
        has_nan = np.issubdtype(y.dtype, np.floating) and not np.isfinite(y).all()
        detail = " and has NaN or infinite values" if has_nan else ""
        how = "save the class number of each image: y = y.astype('int64')"
        raise UsageError(f"{where} is {y.dtype}{detail}, accepted are whole numbers", how)
    if y.shape != (count,):
        raise UsageError(f"{where} has shape {y.shape}; for {count} images ({count},) is accepted", ACCEPTED)
    return y.astype(np.int64)
