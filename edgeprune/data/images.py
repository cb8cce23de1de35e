"""Image files to uint8 pixels of the size and channels of the input, and the two ways to keep them."""

import io
import os
import struct
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from edgeprune.errors import UsageError
from edgeprune.progress import bar

SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".webp"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
# By content, whatever the ending says. No format of which Pillow's reader runs another program (EPS) is among them.
FORMATS = ("PNG", "JPEG", "BMP", "DIB", "GIF", "TIFF", "WEBP", "PPM")
# Raised when the same files give other pixels: results of before are not taken over.
VERSION = 2
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
ALPHA = 4
# What a viewer does to the stored pixels for the orientation that EXIF names.
ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
MAX_PIXELS = 50_000_000
# A progressive JPEG has about ten; a few kB of them keep a decoder busy for hours. libtiff draws the same line.
MAX_SCANS = 100
JPEG_SCAN = b"\xff\xda"
MAX_FILE_BYTES = 256 * 2**20
# What Pillow's decoders raise on broken files, besides OSError (its documentation names no full list).
BROKEN = (
    *(
        OSError,
        SyntaxError,
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        EOFError,
        OverflowError,
        ZeroDivisionError,
    ),
    *(MemoryError, struct.error, zlib.error, Image.DecompressionBombError, Image.DecompressionBombWarning),
)


@dataclass(frozen=True)
class ImageFile:
    """One image: its path inside the data set, and its bytes, or the file that holds them."""

    name: str
    content: bytes | Path

    def read(self) -> bytes:
        """The bytes of the file."""
        if isinstance(self.content, bytes):
            return self.content
        try:
            if self.content.stat().st_size > MAX_FILE_BYTES:
                raise UsageError(
                    f"image {self.name!r} has {self.content.stat().st_size} bytes", _remove(self.name)
                )
            return self.content.read_bytes()
        except OSError as error:
            raise UsageError(f"image {self.name!r} can't be read: {error}", _remove(self.name)) from error


class Pixels(Protocol):
    """Where the pixels of a part of a data set are kept."""

    def take(self, indices: Tensor) -> Tensor:
        """The images at `indices` (n,) as uint8 (n, C, H, W)."""
        ...


@dataclass(frozen=True)
class Decoded:
    """Pixels in memory: uint8 (N, C, H, W)."""

    pixels: Tensor

    def take(self, indices: Tensor) -> Tensor:
        """The images at `indices` (n,) as uint8 (n, C, H, W)."""
        return self.pixels[indices]


@dataclass(frozen=True)
class Chosen:
    """Some of another part's images. indices: int64 (n,)."""

    whole: Pixels
    indices: Tensor

    def take(self, indices: Tensor) -> Tensor:
        """The images at `indices` (n,) of the chosen ones as uint8 (n, C, H, W)."""
        return self.whole.take(self.indices[indices])


@dataclass(frozen=True)
class OnDemand:
    """Files that are decoded at each use, for sets that don't fit in memory."""

    files: tuple[ImageFile, ...]
    shape: tuple[int, int, int]

    def take(self, indices: Tensor) -> Tensor:
        """The images at `indices` (n,) as uint8 (n, C, H, W)."""
        wanted = [self.files[i] for i in indices.tolist()]
        return torch.from_numpy(_decode_all(wanted, self.shape, lambda _steps=1: None))


def keep(files: Sequence[ImageFile], shape: tuple[int, int, int], in_memory: bool, label: str) -> Pixels:
    """Decode the files to `shape` (C, H, W) now, under a bar with that label, or whenever they are needed."""
    if not in_memory:
        return OnDemand(tuple(files), shape)
    with bar(len(files), label) as advance:
        return Decoded(torch.from_numpy(_decode_all(files, shape, advance)))


def from_array(x: np.ndarray, shape: tuple[int, int, int]) -> Decoded:
    """Pixels uint8 (N, H, W, C) as the model takes them; gray becomes RGB and back, other sizes are fitted."""
    if x.shape[1:] == (*shape[1:], shape[0]):
        return Decoded(torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2))))
    if x.shape[3] not in MODES or shape[0] not in MODES:
        raise UsageError(
            f"images have {x.shape[3]} channels, the model takes {shape[0]}",
            "give images of the model's channels",
        )
    out = np.empty((len(x), *shape), np.uint8)
    for index, image in enumerate(x.squeeze(3) if x.shape[3] == 1 else x):
        out[index] = fit(_in_mode(Image.fromarray(image), MODES[shape[0]]), shape)
    return Decoded(torch.from_numpy(out))


@dataclass(frozen=True)
class Header:
    """What the header of an image file says. shape: channels, height and width, turned as EXIF says."""

    shape: tuple[int, int, int]
    frames: int
    transparent: bool


def describe(file: ImageFile) -> Header:
    """The header of an image file."""
    try:
        with _open(file) as image:
            # Pillow gives the size of a TIFF as it is when it is turned.
            lies = image.format != "TIFF" and _orientation(image) > 4
            size = (image.width, image.height) if lies else (image.height, image.width)
            frames = int(getattr(image, "n_frames", 1))
            gray = image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I")
            return Header(((1 if gray else 3), *size), frames, image.has_transparency_data)
    except BROKEN as error:
        raise _unreadable(file, error) from error


def decode(file: ImageFile, shape: tuple[int, int, int]) -> np.ndarray:
    """One image as uint8 (C, H, W), as docs/data.md says: every command sees the pixels that this gives.

    The first frame, turned as EXIF says; gray becomes RGB and back; other sizes are resized and centre-cropped.
    """
    try:
        with _open(file) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UsageError(
                    f"image {file.name!r} is {image.width}x{image.height}, accepted are {MAX_PIXELS} pixels",
                    _remove(file.name),
                )
            if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
                raise UsageError(
                    f"image {file.name!r} has pixels of 32 bits, of which nothing says what is white",
                    f"save {file.name!r} with 8 or 16 bits a channel",
                )
            image.load()
            turn = TURNS.get(_orientation(image))
            return fit(_in_mode(image if turn is None else image.transpose(turn), MODES[shape[0]]), shape)
    except BROKEN as error:
        raise _unreadable(file, error) from error


def fit(image: Image.Image, shape: tuple[int, int, int]) -> np.ndarray:
    """An image of the right mode as uint8 (C, H, W): resized (bilinear, antialiased), the centre cut out."""
    channels, height, width = shape
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), method=Image.Resampling.BILINEAR)
    values = np.asarray(image, dtype=np.uint8).reshape(height, width, channels)
    return values.transpose(2, 0, 1)


def _open(file: ImageFile) -> Image.Image:
    content = file.read()
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    if image.format in ("JPEG", "MPO") and content.count(JPEG_SCAN) > MAX_SCANS:
        raise ValueError(f"it has more than {MAX_SCANS} scans, each of which takes as long as an image")
    return image


def _orientation(image: Image.Image) -> int:
    """1 to 8; of a TIFF whose pixels are loaded 1, because Pillow has turned them."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except BROKEN:
        return 1  # as viewers do: a broken tag is none
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow clips 16-bit gray at 255 when it converts; the high byte is what is meant, as it is of 16-bit color.
        high_byte = np.asarray(image).astype(np.int64).clip(0, 65535) >> 8
        image = Image.fromarray(high_byte.astype(np.uint8))
    if image.mode in ("P", "PA", "RGBa", "La"):
        # A palette may be transparent, which "L" and "RGB" would warn about; the others have no other way.
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    return image if image.mode == mode else image.convert(mode)


def _decode_all(
    files: Sequence[ImageFile], shape: tuple[int, int, int], advance: Callable[..., None]
) -> np.ndarray:
    out = np.empty((len(files), *shape), np.uint8)

    def one(index: int) -> None:
        out[index] = decode(files[index], shape)

    # Pillow frees the interpreter while it decodes; for tiny images threads would cost more than they bring.
    if shape[1] * shape[2] < 64 * 64:
        for index in range(len(files)):
            one(index)
            advance()
        return out
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for _ in pool.map(one, range(len(files))):
            advance()
    return out


def _unreadable(file: ImageFile, error: BaseException) -> UsageError:
    kinds = f"not an image that can be read ({', '.join(FORMATS)})"
    reason = kinds if isinstance(error, UnidentifiedImageError) else str(error)
    return UsageError(f"image {file.name!r} can't be decoded: {reason}", _remove(file.name))


def _remove(name: str) -> str:
    return f"repair or remove {name!r}"
