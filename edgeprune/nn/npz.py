"""Images in a `.npz` file: x (N, H, W, C) or (N, H, W) and y (N,), or the same as x_train, y_train and so on.

Nothing is unpickled, and nothing is unpacked that is far larger than the file or than its header says.
"""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from lzma import LZMAError
from pathlib import Path
from tokenize import TokenError

import numpy as np
from numpy.lib import format as npy

from edgeprune.errors import ModelError, UsageError
from edgeprune.nn.sources import bomb, most_bytes

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

    Raises:
        UsageError: not such a file; says which array is wrong and how to make it right.
        ModelError: a member is damaged: its CRC is not the one that the file has of it.
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
    """A whole member, which zipfile then holds against its CRC."""
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
    """The array of an `.npy` file, in the memory of `content`."""
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
