"""Labelled images: what may be learned from, what is held out, and which images calibrate.

Held-out images are never among those that train or calibrate: the parts share no file, and training images
that are copies of a held-out one are left out.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from edgeprune import targets
from edgeprune.data import images, splits
from edgeprune.errors import UsageError, shortened
from edgeprune.progress import bar
from edgeprune.quantities import check_choice, suggest
from edgeprune.recipe import DataTable
from edgeprune.records import InputSpec

MEMORY_BYTES = 2 * 2**30
CALIBRATION_BYTES = 2**29
SELECTIONS = ("balanced", "random", "first")
_SAMPLED = 64


@dataclass(frozen=True, eq=False)
class Split:
    """One part of a data set. labels: int64 (N,), class numbers."""

    name: str
    labels: Tensor
    pixels: images.Pixels

    def __len__(self) -> int:
        return int(self.labels.shape[0])

    def take(self, indices: Tensor) -> Tensor:
        """The images at `indices` (n,), float32 (n, C, H, W) in [0, 1]."""
        return self.pixels.take(indices).to(torch.float32).div_(255.0)

    def batches(self, size: int, order: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """All images, or those of `order`, `size` at a time (the last may be fewer), with their labels."""
        order = torch.arange(len(self)) if order is None else order
        for indices in order.split(size):
            yield self.take(indices), self.labels[indices]


@dataclass(frozen=True, eq=False)
class Data:
    """A data set. `train` is None when nothing may be learned from it.

    labels: class names in the order of the logits. notes: what a reader of the results should know.
    fingerprint: changes when the files do.
    """

    train: Split | None
    held_out: Split
    labels: tuple[str, ...]
    notes: tuple[str, ...]
    fingerprint: str
    # The numbers of the calibration images -> their pixels, uint8, which every step of a run uses: decoded once.
    calibration: dict[bytes, Tensor] = field(default_factory=dict)


# What a calibration recipe may say of the data set and of its images, so that it can be read alone.
FIXED = {"data": "train", "preprocessing": "resize, centre crop, pixels / 255"}


def in_memory(name: str, pixels: Tensor, labels: Tensor) -> Split:
    """A part from uint8 pixels (N, C, H, W) and class numbers (N,)."""
    return Split(name, labels.to(torch.int64), images.Decoded(pixels))


def divide(split: Split, share: float, seed: int) -> tuple[Split, Split]:
    """Two parts of a split: what is left, and `share` of it, each class alike, to choose by."""
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    aside = [
        mine[: max(1, round(share * len(mine)))]
        for label in split.labels.unique()
        if len(mine := order[split.labels[order] == label]) > 1
    ]
    if not aside:
        raise UsageError(
            f"{split.name} has {len(split)} images, too few to set some aside", "give more training images"
        )
    chosen = torch.cat(aside).sort().values
    rest = torch.ones(len(split), dtype=torch.bool)
    rest[chosen] = False
    names = (split.name, f"validation images of {split.name}")
    left, right = (
        Split(name, split.labels[indices], images.Chosen(split.pixels, indices))
        for name, indices in zip(names, (rest.nonzero().flatten(), chosen), strict=True)
    )
    return left, right


def open_data(table: DataTable, spec: InputSpec, seed: int) -> Data:
    """Open the data set of a recipe for a model.

    A set with parts is trained on train/ and measured on test/ (val/ when there is no test/); one without is
    split by the seed, each class alike. With `use = "evaluate"`, or without training images, `train` is None.
    """
    path = Path(table.path).expanduser()
    found = splits.find(path, spec, table.use == "evaluate")
    choice = splits.choose(path, found.by_name, table, seed)
    notes = found.notes + choice.notes
    used = [part for part in (choice.train, choice.held_out) if part]
    fits = sum(len(part.labels) for part in used) * int(np.prod(spec.shape)) <= MEMORY_BYTES
    for part in used:
        notes += notes_on(part, found.labels, spec)
    held_out = decode_set(choice.held_out, spec, fits)
    train = decode_set(choice.train, spec, fits) if choice.train else None
    if train:
        train, copies = _without_copies(train, held_out)
        notes += copies
    return Data(train, held_out, found.labels, tuple(map(shortened, dict.fromkeys(notes))), found.fingerprint)


def calibration_indices(labels: Tensor, name_or_path: str) -> Tensor:
    """Which images of a training part a recipe of `calibration/` looks at: int64 (n,), for `labels` (N,)."""
    count, seed, selection = _calibration_recipe(targets.resolve("calibration", name_or_path))
    count = min(count, len(labels))
    if selection == "first":
        return torch.arange(count)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return order[:count] if selection == "random" else spread(labels, count, seed)


def spread(labels: Tensor, count: int, seed: int) -> Tensor:
    """At most `count` images of `labels` (N,), the same share of each class, by the seed: int64 (n,)."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    # Round-robin: the k-th image of every class comes before the k+1-th of any.
    turn = torch.empty_like(order)
    for label in labels.unique():
        mine = labels[order] == label
        turn[mine] = torch.arange(int(mine.sum()))
    return order[torch.argsort(turn, stable=True)[:count]]


def calibration_digest(labels: Tensor, name_or_path: str) -> str:
    """The SHA-256 of the chosen images' numbers (int64, little-endian, in their order), in hex."""
    indices = calibration_indices(labels, name_or_path).numpy().astype("<i8")
    return hashlib.sha256(indices.tobytes()).hexdigest()


def calibration_images(data: Data, name_or_path: str) -> Tensor:
    """The calibration images, of the training part only: float32 (n, C, H, W) in [0, 1]."""
    if data.train is None:
        raise UsageError(
            "the data is for evaluation only, so nothing is calibrated on it", "give training images"
        )
    indices = calibration_indices(data.train.labels, name_or_path)
    if isinstance(data.train.pixels, images.Decoded):
        return data.train.take(indices)
    key = indices.numpy().tobytes()
    pixels = data.calibration.get(key)
    if pixels is None:
        with bar(len(indices), "calibration images") as advance:
            chunks = []
            for chunk in indices.split(256):
                chunks.append(data.train.pixels.take(chunk))
                advance(len(chunk))
        pixels = torch.cat(chunks)
        data.calibration.clear()
        if pixels.numel() <= CALIBRATION_BYTES:
            data.calibration[key] = pixels
    return pixels.to(torch.float32).div_(255.0)


def calibration_set(data: Data, name_or_path: str) -> tuple[Tensor, Tensor]:
    """The calibration images, float32 (n, C, H, W) in [0, 1], and their class numbers, int64 (n,)."""
    images = calibration_images(data, name_or_path)
    assert data.train is not None
    return images, data.train.labels[calibration_indices(data.train.labels, name_or_path)]


def decode_set(part: splits.Part, spec: InputSpec, at_once: bool) -> Split:
    """The images of a part, at once or as they are read."""
    if isinstance(part.content, np.ndarray):
        pixels: images.Pixels = images.from_array(part.content, spec.shape)
    else:
        pixels = images.keep(part.content, spec.shape, at_once, f"decoding {part.name}")
    return Split(part.name, torch.from_numpy(part.labels), pixels)


def notes_on(part: splits.Part, labels: tuple[str, ...], spec: InputSpec) -> tuple[str, ...]:
    """What a reader of the report must know about a part."""
    notes = []
    present = set(part.labels.tolist())
    missing = [name for index, name in enumerate(labels) if index not in present]
    if missing:
        notes.append(f"{part.name} has no image of: {', '.join(missing)}")
    if isinstance(part.content, np.ndarray):
        shapes = [(int(part.content.shape[3]), *part.content.shape[1:3])]
    else:
        headers = [images.describe(f) for f in part.content[:: max(1, len(part.content) // _SAMPLED)]]
        shapes = [header.shape for header in headers]
        if any(header.frames > 1 for header in headers):
            notes.append("of images with several frames or pages only the first is used")
        if spec.shape[0] != images.ALPHA and any(header.transparent for header in headers):
            notes.append("transparency is ignored: the colors below it are used as they are stored")
    channels, height, width = spec.shape
    sizes = sorted({shape[1:] for shape in shapes if shape[1:] != (height, width)})
    if sizes:
        example = f"{sizes[0][0]}x{sizes[0][1]}"
        notes.append(
            f"images that are not {height}x{width} (such as {example}) are resized and centre-cropped"
        )
    if any(shape[0] != channels for shape in shapes):
        notes.append("gray images are made RGB" if channels > 1 else "color images are made gray")
    return tuple(notes)


def _without_copies(train: Split, held_out: Split) -> tuple[Split, tuple[str, ...]]:
    """The training part without copies of held-out images; files that are read on demand are not compared."""
    if not isinstance(train.pixels, images.Decoded) or not isinstance(held_out.pixels, images.Decoded):
        return train, ()
    held = set(_digests(held_out.pixels.pixels))
    keep = [index for index, digest in enumerate(_digests(train.pixels.pixels)) if digest not in held]
    copies = len(train) - len(keep)
    if not copies:
        return train, ()
    if not keep:
        raise UsageError(
            f"each of the {len(train)} training images is also among the {len(held_out)} held-out ones",
            "give a test part of its own, or one folder of class folders, which is split",
        )
    chosen = torch.tensor(keep)
    left = in_memory(train.name, train.pixels.pixels[chosen], train.labels[chosen])
    return left, (f"{copies} training images are copies of held-out ones and are left out",)


def _digests(pixels: Tensor) -> Iterator[bytes]:
    for image in pixels.numpy():
        yield hashlib.blake2b(image.tobytes(), digest_size=16).digest()


def _calibration_recipe(path: Path) -> tuple[int, int, str]:
    table = targets.read_toml(path)
    known = {"title": str, "count": int, "seed": int, "selection": str}
    for key, only in FIXED.items():
        if table.pop(key, only) != only:
            raise UsageError(f"{path}: {key} must be {only!r}", "leave it out: nothing else is there yet")
    for key in table:
        if key not in known:
            raise UsageError(f"{path}: unknown key {key!r}", suggest(key, known))
    for key, kind in known.items():
        if type(table.get(key)) is not kind:
            found = f"is {table[key]!r}" if key in table else "is missing"
            raise UsageError(f"{path}: {key} {found}, it must be of type {kind.__name__}")
    for key, least, most in (("count", 1, 10**9), ("seed", 0, 2**32 - 1)):
        if not least <= table[key] <= most:
            raise UsageError(f"{path}: {key} = {table[key]} must be between {least} and {most}")
    check_choice(f"{path}: selection", table["selection"], SELECTIONS)
    return table["count"], table["seed"], table["selection"]
