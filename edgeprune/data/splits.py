"""The parts of a data set before anything is decoded, and which of them trains and which is held out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from edgeprune.data import sources
from edgeprune.data.images import MODES, SUFFIXES, ImageFile
from edgeprune.data.sources import Found
from edgeprune.errors import UsageError
from edgeprune.recipe import DataTable
from edgeprune.records import InputSpec
from edgeprune.serialization import sha256

PARTS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}

LAYOUTS = "accepted: CLASS/IMAGE or train|val|test/CLASS/IMAGE, with images in " + " ".join(SUFFIXES)

_KINDS = 12

LabelPath = tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """The image files of each part with their class numbers; the part "" is a set without a split."""

    parts: dict[str, tuple[tuple[ImageFile, int], ...]]
    classes: tuple[str, ...]
    notes: tuple[str, ...]


def arrange(found: Found, where: str) -> Layout:
    """Sort the files into parts and classes; classes are numbered by the sorted names of their folders."""
    if not found.files:
        raise UsageError(
            f"{where}: no images found ({_words(found) or 'no other files'}, {len(found.folders)} folders)",
            LAYOUTS,
        )
    paths = [tuple(file.name.split("/")) for file in found.files]
    top = _common_top(paths)
    folders = [folder[top:] for folder in found.folders if folder[:top] == paths[0][:top]]
    paths = [path[top:] for path in paths]
    split = {path[0] for path in paths if len(path) > 2 and path[0].lower() in PARTS}
    depth = 1 if split else 0

    def in_class(path: LabelPath) -> bool:
        return len(path) > depth + 1 and (not split or path[0] in split)

    names = {path[depth] for path in paths if in_class(path)}
    if not names:
        raise UsageError(
            f"{where}: {len(paths)} images, none in a class folder (such as {'/'.join(paths[0])!r})", LAYOUTS
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
    ordered = sorted(found.passed.items(), key=lambda item: -item[1][0])
    words = [
        f"{count} {kind if count == 1 else _several(kind)} (such as {first!r})"
        for kind, (count, first) in ordered[:_KINDS]
    ]
    more = sum(count for _, (count, _) in ordered[_KINDS:])
    return ", ".join(words + [f"{more} of other kinds"] * bool(more))


def _several(kind: str) -> str:
    noun, space, rest = kind.partition(" ") if kind[0] not in ".hb" else (kind, "", "")
    return f"{noun}s{space}{rest}"


def _common_top(paths: list[LabelPath]) -> int:
    shortest = min(len(path) for path in paths)
    top = 0
    while shortest > top + 2 and len({p[top] for p in paths}) == 1 and paths[0][top].lower() not in PARTS:
        top += 1
    return top


def _ignored(paths: Iterable[LabelPath]) -> tuple[str, ...]:
    ignored = list(paths)
    return (
        (f"{len(ignored)} images lie in no class folder and are ignored, such as {'/'.join(ignored[0])!r}",)
        if ignored
        else ()
    )


TARS = (".tar", ".tar.xz", ".tar.gz", ".tar.bz2", ".txz", ".tgz", ".tbz2")
# Of a model that does not say its own.
MOST_CLASSES = 2**16
ACCEPTED = f"accepted: a folder of class folders, a tar of one ({', '.join(TARS)}), or .npz"


@dataclass(frozen=True, eq=False)
class Part:
    """Image files, or an array uint8 (N, H, W, C), with class numbers int64 (N,)."""

    name: str
    content: Sequence[ImageFile] | np.ndarray
    labels: np.ndarray

    def at(self, name: str, indices: np.ndarray) -> Part:
        """The images at `indices` as a part of its own."""
        if isinstance(self.content, np.ndarray):
            return Part(name, self.content[indices], self.labels[indices])
        return Part(name, [self.content[i] for i in indices], self.labels[indices])


@dataclass(frozen=True, eq=False)
class Parts:
    """What lies at a path: parts by name ("train", "val", "test", or "" for a set without a split)."""

    by_name: Mapping[str, Part]
    labels: tuple[str, ...]
    notes: tuple[str, ...]
    fingerprint: str


@dataclass(frozen=True, eq=False)
class Choice:
    """What to learn from (None: nothing) and what to measure on."""

    train: Part | None
    held_out: Part
    notes: tuple[str, ...] = ()


def find(path: Path, spec: InputSpec, evaluate: bool) -> Parts:
    """Read or list the data at a path; with `evaluate` an array of training images is not read."""
    if not path.exists():
        raise UsageError(f"no data at {str(path)!r}", ACCEPTED)
    if path.is_file() and path.suffix.lower() == ".npz":
        return _from_arrays(path, spec, evaluate)
    if path.is_dir():
        found = sources.from_folder(path)
    elif path.is_file() and path.name.lower().endswith(TARS):
        found = sources.from_tar(path)
    else:
        raise UsageError(f"{str(path)!r} is not a kind of data that can be read", ACCEPTED)
    if spec.shape[0] not in MODES:
        raise UsageError(
            f"the model takes {spec.shape[0]} channels, image files have 1, 3 or 4", "give the data as .npz"
        )
    plan = arrange(found, str(path))
    _check_classes(path, plan.classes, spec.classes)
    parts = {
        name: Part(name, [file for file, _ in items], np.array([label for _, label in items], np.int64))
        for name, items in plan.parts.items()
    }
    return Parts(parts, plan.classes, plan.notes, found.fingerprint)


def choose(path: Path, parts: Mapping[str, Part], table: DataTable, seed: int) -> Choice:
    """Train on train/ and measure on test/, or val/ when there is no test/; a set without a split is split."""
    evaluate = table.use == "evaluate"
    held_out = parts.get("test") or parts.get("val")
    if held_out:
        train = None if evaluate else parts.get("train")
        notes: tuple[str, ...] = ()
        if len(parts.keys() & {"test", "val"}) > 1:
            notes += ("val is not used: accuracy is measured on test",)
        if not train and not evaluate:
            notes += ("the data has no train part, so nothing is trained or calibrated on it",)
        return Choice(train, held_out, notes)
    whole = parts.get("") or parts["train"]
    if not evaluate:
        return _split(path, whole, table.val_share, seed)
    if whole.name == "train":
        raise UsageError(
            f"{path} has a train part only, and accuracy on training images says little",
            "add a test or val part, or give the path of the train folder itself",
        )
    return Choice(None, replace(whole, name="all"))


def stratified(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices to learn from and to hold out, `share` of each class; at least one of each is learned from."""
    order = np.random.default_rng(seed).permutation(len(labels))
    hold: list[np.ndarray] = []
    for label in np.unique(labels):
        mine = order[labels[order] == label]
        hold.append(mine[: min(len(mine) - 1, max(1, round(share * len(mine))))])
    held = np.sort(np.concatenate(hold))
    return np.setdiff1d(np.arange(len(labels)), held), held


def _split(path: Path, whole: Part, share: float, seed: int) -> Choice:
    learn, hold = stratified(whole.labels, share, seed)
    count = len(whole.labels)
    if not len(hold):
        raise UsageError(
            f"{path}: {count} images are too few to hold some out", "give at least two images of one class"
        )
    note = (
        f"the data has no test or val part: {len(hold)} of its {count} images, "
        f"the same share of each class, are held out (seed {seed})"
    )
    return Choice(whole.at("train", learn), whole.at("held out", hold), (note,))


def _from_arrays(path: Path, spec: InputSpec, evaluate: bool) -> Parts:
    arrays, notes = sources.read(path, skip=("train",) if evaluate else ())
    for name, part in arrays.items():
        low, high = int(part.y.min()), int(part.y.max())
        if low < 0 or high >= (spec.classes or MOST_CLASSES):
            array = f"y_{name}" if name else "y"
            raise UsageError(
                f"{path}: {array} has labels from {low} to {high}, the model has {spec.classes or 'some'} outputs",
                f"labels are the numbers of the outputs, 0 to {(spec.classes or MOST_CLASSES) - 1}",
            )
    parts = {name: Part(name, part.x, part.y) for name, part in arrays.items()}
    count = spec.classes or 1 + max(int(part.y.max()) for part in arrays.values())
    return Parts(parts, tuple(str(k) for k in range(count)), notes, sha256(path))


def _check_classes(path: Path, classes: tuple[str, ...], outputs: int) -> None:
    if len(classes) == outputs or not outputs:
        return
    shown = ", ".join(classes[:12]) + (", ..." if len(classes) > 12 else "")
    raise UsageError(
        f"{path} has {len(classes)} class folders ({shown}), the model has {outputs} outputs",
        "the folders, sorted by name, are the outputs: give one for each, empty if a class has no images",
    )
