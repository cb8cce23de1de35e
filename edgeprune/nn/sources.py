"""The image files in a folder or a tar: listed or read into memory, never unpacked to disk."""

from __future__ import annotations

import hashlib
import os
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from lzma import LZMAError
from pathlib import Path

from edgeprune.errors import UsageError
from edgeprune.nn.images import MAX_FILE_BYTES, SUFFIXES, ImageFile
from edgeprune.nn.progress import bar

TAR_MAX_BYTES = 8 * 2**30
BROKEN_TAR = (tarfile.TarError, OSError, EOFError, LZMAError, zlib.error, MemoryError, ValueError)
DEEPEST = 32


@dataclass(frozen=True)
class Found:
    """What a folder or tar holds.

    files: the images in the order of their names. folders: every folder, as the parts of its path.
    others: how many files are not images. fingerprint: sha256 (hex), another one when something changed.
    """

    files: tuple[ImageFile, ...]
    folders: frozenset[tuple[str, ...]]
    others: int
    fingerprint: str


def from_folder(root: Path) -> Found:
    """List a folder; the images are read later. The fingerprint covers names, sizes and times of change.

    Raises:
        UsageError: a folder in it can't be read.
    """
    files: list[ImageFile] = []
    folders: set[tuple[str, ...]] = set()
    digest, others = hashlib.sha256(), 0
    status = root.stat()
    for parts, entry in _walk(root, (), frozenset({(status.st_dev, status.st_ino)})):
        if entry.is_dir():
            folders.add(parts)
        elif _is_image(parts):
            name, status = "/".join(parts), entry.stat()
            digest.update(
                f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode("utf-8", "surrogateescape")
            )
            files.append(ImageFile(name, Path(entry.path)))
        else:
            others += 1
    return Found(tuple(files), frozenset(folders), others, digest.hexdigest())


def from_tar(path: Path) -> Found:
    """Read the image files of a tar into memory, not decoded. The fingerprint is the sha256 of the tar.

    Links, devices and names that are absolute or climb with ".." are passed over.

    Raises:
        UsageError: not a tar, cut short, damaged, or more than 8 GiB of images.
    """
    files: dict[str, ImageFile] = {}
    folders: set[tuple[str, ...]] = set()
    others = 0
    try:
        for parts, content in _members(path):
            folders.update(parts[:i] for i in range(1, len(parts)))
            if content is None:
                folders.add(parts)
            elif _is_image(parts):
                files["/".join(parts)] = ImageFile("/".join(parts), content)
            else:
                others += 1
    except BROKEN_TAR as error:
        hint = "make it again: tar -cJf data.tar.xz FOLDER"
        raise UsageError(f"{path} can't be read as a tar: {error}", hint) from error
    ordered = tuple(files[name] for name in sorted(files))
    return Found(ordered, frozenset(folders), others, sha256(path))


def sha256(path: Path) -> str:
    """The SHA-256 of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _members(path: Path) -> Iterator[tuple[tuple[str, ...], bytes | None]]:
    """The regular files of a tar with their content, empty unless they are images; its folders with None."""
    total = position = 0
    with (
        path.open("rb") as raw,
        tarfile.open(fileobj=raw, mode="r:*") as archive,
        bar(path.stat().st_size // 1000, f"reading {path.name} (kB)") as advance,
    ):
        for member in archive:
            parts = _safe_parts(member.name)
            if not parts or not (member.isfile() or member.isdir()):
                continue
            content = b""
            if member.isfile() and _is_image(parts):
                total += member.size
                _check_size(path, member, total)
                stream = archive.extractfile(member)
                content = stream.read() if stream else b""
            yield parts, None if member.isdir() else content
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
    folder: Path, parts: tuple[str, ...], seen: frozenset[tuple[int, int]]
) -> Iterator[tuple[tuple[str, ...], os.DirEntry[str]]]:
    """Folders and regular files below, in the order of their names; links are followed, never in a circle."""
    try:
        with os.scandir(folder) as entries:
            ordered = sorted(entries, key=lambda e: e.name)
    except OSError as error:
        raise UsageError(f"folder {str(folder)!r} can't be read: {error}") from error
    for entry in ordered:
        inner = (*parts, entry.name)
        if entry.is_dir():
            status = entry.stat()
            key = (status.st_dev, status.st_ino)
            if key not in seen and len(inner) < DEEPEST:
                yield inner, entry
                yield from _walk(Path(entry.path), inner, seen | {key})
        elif entry.is_file():
            yield inner, entry


def _safe_parts(name: str) -> tuple[str, ...]:
    parts = tuple(p for p in name.split("/") if p not in ("", "."))
    return () if name.startswith("/") or ".." in parts or len(parts) > DEEPEST else parts


def _is_image(parts: tuple[str, ...]) -> bool:
    hidden = any(p.startswith(".") or p == "__MACOSX" for p in parts)
    return parts[-1].lower().endswith(SUFFIXES) and not hidden
