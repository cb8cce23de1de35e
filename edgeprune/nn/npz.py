"""Images in a `.npz` file: x (N, H, W, C) or (N, H, W) and y (N,), or the same as x_train, y_train and so on.

Nothing is unpickled: a file with an array of objects is refused.
"""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgeprune.errors import UsageError

SETS = {"": "", "_train": "train", "_val": "val", "_test": "test"}
ACCEPTED = (
    "accepted: x uint8 (N, H, W, C) or (N, H, W) and y integer (N,), or x_train, y_train, x_test, y_test"
)
BROKEN_NPZ = (
    OSError,
    ValueError,
    EOFError,
    KeyError,
    MemoryError,
    TypeError,
    zipfile.BadZipFile,
    zlib.error,
    NotImplementedError,
)


@dataclass(frozen=True)
class Arrays:
    """One part: x uint8 (N, H, W, C), C being 1 when the file has no such axis, and y int64 (N,)."""

    x: np.ndarray
    y: np.ndarray


def read(path: Path, skip: tuple[str, ...] = ()) -> tuple[dict[str, Arrays], tuple[str, ...]]:
    """The parts in a file by name ("train", "val", "test", or "" for a set without a split), and notes.

    Parts named in `skip` are left unread if there is another one.

    Raises:
        UsageError: not such a file; says which array is wrong and how to make it right.
    """
    try:
        with zipfile.ZipFile(path):
            pass
        with np.load(path, allow_pickle=False) as file:
            names = list(file.files)
            found = {p: s for s, p in SETS.items() if "x" + s in names or "y" + s in names}
            if not found:
                raise UsageError(f"{path} holds {', '.join(names) or 'nothing'}, but no x and y", ACCEPTED)
            if "" in found and len(found) > 1:
                raise UsageError(f"{path} holds {', '.join(names)}: x and y or parts, not both", ACCEPTED)
            wanted = {part: suffix for part, suffix in found.items() if part not in skip} or found
            parts = {part: _part(path, file, suffix) for part, suffix in wanted.items()}
    except BROKEN_NPZ as error:
        raise UsageError(f"{path} can't be read as .npz: {error}", ACCEPTED) from error
    unused = sorted(set(names) - {axis + suffix for suffix in found.values() for axis in "xy"})
    return parts, ((f"arrays ignored: {', '.join(unused)}",) if unused else ())


def _part(path: Path, file: np.lib.npyio.NpzFile, suffix: str) -> Arrays:
    for name in ("x" + suffix, "y" + suffix):
        if name not in file.files:
            raise UsageError(f"{path} has no {name!r}, it holds {', '.join(file.files)}", ACCEPTED)
    x = _pixels(f"{path}: x{suffix}", file["x" + suffix])
    return Arrays(x, _labels(f"{path}: y{suffix}", file["y" + suffix], len(x)))


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
