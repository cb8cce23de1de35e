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
DEEPEST = 32


@dataclass(frozen=True)
class Found:
    """What a folder or tar holds: image files in the order of their names, all folders, and what tells a change.

    folders: every folder, as the parts of its path. others: how many files are not images. fingerprint: sha256, hex.
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
            digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
            files.append(ImageFile(name, Path(entry.path)))
        else:
            others += 1
    return Found(tuple(files), frozenset(folders), others, digest.hexdigest())


def from_tar(path: Path) -> Found:
    """Read the image files of a tar into memory, still compressed as images. The fingerprint is the file's sha256.

    Links, devices and names that are absolute or climb with ".." are passed over.

    Raises:
        UsageError: not a tar, cut short, damaged, or more than 8 GiB of images.
    """
    files: dict[str, ImageFile] = {}
    folders: set[tuple[str, ...]] = set()
    others = 0
    try:
        with tarfile.open(path, "r:*") as archive, bar(0, f"reading {path.name}") as advance:
            for member in _members(archive):
                parts = _safe_parts(member.name)
                folders.update(parts[:i] for i in range(1, len(parts) + member.isdir()))
                if parts and member.isfile() and _is_image(parts):
                    name = "/".join(parts)
                    files[name] = ImageFile(name, _content(archive, member))
                    advance(len(files) == 1 or 1)
                else:
                    others += not member.isdir()
    except (tarfile.TarError, OSError, EOFError, LZMAError, zlib.error, MemoryError, ValueError) as error:
        raise UsageError(f"{path} can't be read as a tar: {error}", "make it again: tar -cJf data.tar.xz FOLDER") from error
    if sum(len(f.content) for f in files.values() if isinstance(f.content, bytes)) > TAR_MAX_BYTES:
        raise UsageError(f"{path} holds more than {TAR_MAX_BYTES} bytes of images", "unpack it and give the folder")
    return Found(tuple(files[name] for name in sorted(files)), frozenset(folders), others, sha256(path))
