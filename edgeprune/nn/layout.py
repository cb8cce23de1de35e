"""Which part (train, val, test) and which class each image file of a data set belongs to.

Accepted are CLASS/IMAGE and PART/CLASS/IMAGE, the whole possibly inside further folders. A part is a folder
named train, val or test (or training, valid, validation, testing) that holds class folders; so a class may be
named "train" too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from edgeprune.errors import UsageError
from edgeprune.nn.images import SUFFIXES, ImageFile
from edgeprune.nn.sources import Found

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
_KINDS = 12

Path = tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """The image files of each part with their class numbers; the part "" is a set without a split."""

    parts: dict[str, tuple[tuple[ImageFile, int], ...]]
    classes: tuple[str, ...]
    notes: tuple[str, ...]


def arrange(found: Found, where: str) -> Layout:
    """Sort the files into parts and classes; classes are numbered by the sorted names of their folders.

    Raises:
        UsageError: no images, or none in a class folder; says what was found.
    """
    if not found.files:
        raise UsageError(
            f"{where}: no images found ({_words(found) or 'no other files'}, {len(found.folders)} folders)",
            ACCEPTED,
        )
    paths = [tuple(file.name.split("/")) for file in found.files]
    top = _common_top(paths)
    folders = [folder[top:] for folder in found.folders if folder[:top] == paths[0][:top]]
    paths = [path[top:] for path in paths]
    split = {path[0] for path in paths if len(path) > 2 and path[0].lower() in PARTS}
    depth = 1 if split else 0

    def in_class(path: Path) -> bool:
        return len(path) > depth + 1 and (not split or path[0] in split)

    names = {path[depth] for path in paths if in_class(path)}
    if not names:
        raise UsageError(
            f"{where}: {len(paths)} images, none in a class folder (such as {'/'.join(paths[0])!r})", ACCEPTED
        )
    names |= {f[depth] for f in folders if in_class((*f, "")) and len(f) == depth + 1}
    classes = tuple(sorted(names))
    number = {name: index for index, name in enumerate(classes)}
    parts: dict[str, list[tuple[ImageFile, int]]] = {}
    for file, path in zip(found.files, paths, strict=True):
        if in_class(path):
            parts.setdefault(PARTS[path[0].lower()] if split else "", []).append((file, number[path[depth]]))
    notes = _ignored(path for path in paths if not in_class(path))
    notes += (f"passed over: {_words(found)}",) if found.passed else ()
    return Layout({name: tuple(items) for name, items in parts.items()}, classes, notes)


def _words(found: Found) -> str:
    """What is passed over: how many of each kind, with an example."""
    ordered = sorted(found.passed.items(), key=lambda item: -item[1][0])
    words = [
        f"{count} {kind if count == 1 else _several(kind)} (such as {first!r})"
        for kind, (count, first) in ordered[:_KINDS]
    ]
    more = sum(count for _, (count, _) in ordered[_KINDS:])
    return ", ".join(words + [f"{more} of other kinds"] * bool(more))


def _several(kind: str) -> str:
    """The plural: files without an ending, links in a circle, hidden images."""
    noun, space, rest = kind.partition(" ") if kind[0] not in ".hb" else (kind, "", "")
    return f"{noun}s{space}{rest}"


def _common_top(paths: list[Path]) -> int:
    """How many leading folders hold everything and are neither a part nor a class."""
    shortest = min(len(path) for path in paths)
    top = 0
    while shortest > top + 2 and len({p[top] for p in paths}) == 1 and paths[0][top].lower() not in PARTS:
        top += 1
    return top


def _ignored(paths: Iterable[Path]) -> tuple[str, ...]:
    ignored = list(paths)
    return (
        (f"{len(ignored)} images lie in no class folder and are ignored, such as {'/'.join(ignored[0])!r}",)
        if ignored
        else ()
    )
