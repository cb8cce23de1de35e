"""A folder of class folders, or a tar of one, to the image files of each part (train, val, test) and their classes.

Accepted are CLASS/IMAGE and PART/CLASS/IMAGE, the whole possibly inside further folders. Parts are folders named train,
val or test (or training, valid, validation, testing) that hold class folders; a class may have any name, "train" too.
"""

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

PARTS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
ACCEPTED = "accepted: CLASS/IMAGE or train|val|test/CLASS/IMAGE, with images in " + " ".join(SUFFIXES)
TAR_MAX_BYTES = 8 * 2**30
_DEEPEST = 32


@dataclass(frozen=True)
class Found:
    """What a folder or tar holds: image files, all folders (as parts of their path), and what tells a change."""

    files: tuple[ImageFile, ...]
    folders: frozenset[tuple[str, ...]]
    others: int
    fingerprint: str


@dataclass(frozen=True)
class Layout:
    """The image files of each part with their class numbers; the part "" is a set without a split."""

    parts: dict[str, tuple[tuple[ImageFile, int], ...]]
    classes: tuple[str, ...]
    notes: tuple[str, ...]


def from_folder(root: Path) -> Found:
    """List a folder; files are read later.

    Raises:
        UsageError: a folder in it can't be read.
    """
    files, folders, digest, others = [], set(), hashlib.sha256(), 0
    for parts, path in _walk(root):
        if path is None:
            folders.add(parts)
            continue
        if _is_image(parts):
            status = path.stat()
            name = "/".join(parts)
            digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
            files.append(ImageFile(name, path))
        else:
            others += 1
    return Found(tuple(files), frozenset(folders), others, digest.hexdigest())


def from_tar(path: Path) -> Found:
    """Read the image files of a tar into memory, still compressed; nothing is written to disk.

    Links, devices and names that are absolute or climb with ".." are passed over.

    Raises:
        UsageError: not a tar, cut short, damaged, or more than 8 GiB of images.
    """
    files: dict[str, ImageFile] = {}
    folders: set[tuple[str, ...]] = set()
    others = 0
    try:
        with tarfile.open(path, "r:*") as archive, bar(path.stat().st_size, f"reading {path.name}") as advance:
            for parts, content in _members(archive, path, advance):
                folders.update(parts[:i] for i in range(1, len(parts)))
                if content is None:
                    others += 1
                elif content is _FOLDER:
                    folders.add(parts)
                else:
                    files["/".join(parts)] = ImageFile("/".join(parts), content)
        digest = _sha256(path)
    except (tarfile.TarError, OSError, EOFError, LZMAError, zlib.error, MemoryError, ValueError) as error:
        raise UsageError(f"{path} can't be read as a tar: {error}", "make it again with: tar -cJf data.tar.xz FOLDER") from error
    ordered = tuple(files[name] for name in sorted(files))
    return Found(ordered, frozenset(folders), others, digest)


def arrange(found: Found, where: str) -> Layout:
    """Sort the files into parts and classes; classes are numbered by the sorted names of their folders.

    Raises:
        UsageError: no images, or none in a class folder; says what was found.
    """
    if not found.files:
        raise UsageError(f"{where}: no images found ({found.others} other files, {len(found.folders)} folders)", ACCEPTED)
    paths = {file: tuple(file.name.split("/")) for file in found.files}
    top = _common_top(list(paths.values()))
    inside = {file: parts[top:] for file, parts in paths.items()}
    folders = {folder[top:] for folder in found.folders if folder[:top] == next(iter(paths.values()))[:top]}
    split = {name for name in {p[0] for p in inside.values() if len(p) > 2} if name.lower() in PARTS}
    depth = 1 if split else 0
    loose = [f for f, p in inside.items() if len(p) < depth + 2]
    classed = {f: p for f, p in inside.items() if len(p) >= depth + 2 and (not split or p[0] in split)}
    if not classed:
        raise UsageError(f"{where}: {len(loose)} images, but none in a class folder (such as {loose[0].name!r})", ACCEPTED)
    notes = _notes_on_ignored(len(loose), {p[0] for p in inside.values() if len(p) > depth + 1} - split if split else set())
    names = {p[depth] for p in classed.values()}
    names |= {f[depth] for f in folders if len(f) == depth + 1 and (not split or f[0] in split) and _is_shown(f)}
    classes = tuple(sorted(names))
    number = {name: index for index, name in enumerate(classes)}
    parts: dict[str, list[tuple[ImageFile, int]]] = {}
    for file, path in classed.items():
        parts.setdefault(PARTS[path[0].lower()] if split else "", []).append((file, number[path[depth]]))
    return Layout({name: tuple(items) for name, items in parts.items()}, classes, tuple(notes))


def _notes_on_ignored(loose: int, folders: set[str]) -> list[str]:
    notes = [f"{loose} images lie in no class folder and are ignored"] if loose else []
    if folders:
        notes.append(f"ignored beside the parts: {', '.join(sorted(folders))}")
    return notes


def _common_top(paths: list[tuple[str, ...]]) -> int:
    """How many leading folders hold everything and are neither a part nor a class."""
    top = 0
    while len({p[top] for p in paths}) == 1 and min(len(p) for p in paths) > top + 2 and paths[0][top].lower() not in PARTS:
        top += 1
    return top


def _walk(root: Path) -> Iterator[tuple[tuple[str, ...], Path | None]]:
    """Folders (path None) and regular files below root, in sorted order; links are followed, but never in a circle."""

    def below(folder: Path, parts: tuple[str, ...], seen: frozenset[tuple[int, int]]) -> Iterator[tuple[tuple[str, ...], Path | None]]:
        try:
            entries = sorted(os.scandir(folder), key=lambda e: e.name)
        except OSError as error:
            raise UsageError(f"folder {str(folder)!r} can't be read: {error}") from error
        for entry in entries:
            inner = (*parts, entry.name)
            if entry.is_dir():
                status = entry.stat()
                if (status.st_dev, status.st_ino) not in seen and len(inner) < _DEEPEST:
                    yield inner, None
                    yield from below(Path(entry.path), inner, seen | {(status.st_dev, status.st_ino)})
            elif entry.is_file():
                yield inner, Path(entry.path)

    status = root.stat()
    yield from below(root, (), frozenset({(status.st_dev, status.st_ino)}))


def _safe_parts(name: str) -> tuple[str, ...]:
    parts = tuple(p for p in name.split("/") if p not in ("", "."))
    return () if name.startswith("/") or ".." in parts or len(parts) > _DEEPEST else parts


def _is_shown(parts: tuple[str, ...]) -> bool:
    return not any(p.startswith(".") or p == "__MACOSX" for p in parts)


def _is_image(parts: tuple[str, ...]) -> bool:
    return parts[-1].lower().endswith(SUFFIXES) and _is_shown(parts)


def _check_size(path: Path, member: tarfile.TarInfo, total: int) -> None:
    if member.size > MAX_FILE_BYTES:
        raise UsageError(f"{path}: {member.name!r} has {member.size} bytes, accepted are at most {MAX_FILE_BYTES} for an image")
    if total > TAR_MAX_BYTES:
        raise UsageError(f"{path}: more than {TAR_MAX_BYTES} bytes of images", "unpack it and give the folder")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
