"""Messages between here and an agent that stays open: a head with kind, length and checksum, and a body of bytes."""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING, Any, Mapping, NamedTuple, Optional, Tuple

from edgeprune.errors import DeviceError, UsageError

if TYPE_CHECKING:
    import numpy as np


def text(request: Mapping[str, Any], key: str) -> str:
    """A path that must be there."""
    value = request.get(key)
    if not isinstance(value, str) or not value:
        raise UsageError(f"{key} must be a path, got {value!r}")
    return value


def count(request: Mapping[str, Any], key: str, least: int = 1) -> int:
    """A whole number of at least `least`, which is also what a missing one is."""
    value = request.get(key, least)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UsageError(f"{key} must be a whole number >= {least}, got {value!r}")
    return value


def positive(request: Mapping[str, Any], key: str) -> float:
    """A number above 0."""
    value = request.get(key)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
        raise UsageError(f"{key} must be a number > 0, got {value!r}")
    return float(value)


def optional(request: Mapping[str, Any], key: str) -> float | None:
    """A number above 0, or None where the request does not name one."""
    return None if request.get(key) is None else positive(request, key)


def shape(request: Mapping[str, Any]) -> tuple[int, int, int] | None:
    """The "shape" [C, H, W] of an image, or None where the request does not name one."""
    value = request.get("shape")
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 3 or not all(isinstance(v, int) and v > 0 for v in value):
        raise UsageError(f"shape must be [C, H, W], got {value!r}")
    return value[0], value[1], value[2]


def models(request: Mapping[str, Any]) -> Mapping[str, str]:
    """The "models" {name: path} of a request, at least one."""
    value = request.get("models")
    if not isinstance(value, dict) or not value or not all(isinstance(v, str) and v for v in value.values()):
        raise UsageError(f"models must map a name to a path, got {value!r:.200}")
    return value


MAGIC = b"\xedPR1"
# READY: JSON. WHOLE: images. CHANGED: those pixels that are not as in the message before. LOGITS: the answer.
READY, WHOLE, CHANGED, LOGITS = 1, 2, 3, 4
_HEAD, _OWN = struct.Struct("<4sBII"), struct.Struct("<I")
_SHAPES = {WHOLE: struct.Struct("<4I"), CHANGED: struct.Struct("<5I"), LOGITS: struct.Struct("<2I")}
HEAD_BYTES = _HEAD.size + _OWN.size
# Images of one message, which the other end keeps too; the length of a message has 32 bits.
MOST_BYTES = 2**26
_FASTEST = 1


class Head(NamedTuple):
    """What the head of a message says."""

    kind: int
    size: int
    checksum: int


# Stands for what began as no message does.
DAMAGED = Head(0, 1, 0)


def packed(kind: int, body: bytes) -> bytes:
    """A whole message."""
    first = _HEAD.pack(MAGIC, kind, len(body), zlib.crc32(body))
    # Of its own too: who believed a wrong length would wait for bytes that never come.
    return first + _OWN.pack(zlib.crc32(first)) + body


def head(data: bytes) -> Optional[Head]:
    """What the first bytes of a message say; None when it is none."""
    first, own = data[: _HEAD.size], data[_HEAD.size :]
    if len(data) != HEAD_BYTES or not data.startswith(MAGIC) or _OWN.unpack(own)[0] != zlib.crc32(first):
        return None
    return Head(*_HEAD.unpack(first)[1:])


def checked(found: Head, body: bytes) -> bytes:
    """The body of a message."""
    if len(body) != found.size or zlib.crc32(body) != found.checksum:
        raise DeviceError(
            f"of a message of {found.size} bytes, {len(body)} bytes arrived that are not what was sent",
            "the way to the device changes bytes: is something between that speaks text alone?",
        )
    return body


def images(x: np.ndarray, last: Optional[np.ndarray]) -> Tuple[int, bytes]:
    """Images as kind and body of a message: whole, or what changed where that is shorter."""
    import numpy as np

    if last is not None and last.shape == x.shape:
        # Bit by bit, so that a NaN is like itself and -0.0 is not 0.0.
        differs = x.view(np.uint32).ravel() != last.view(np.uint32).ravel()
        mask = zlib.compress(np.packbits(differs).tobytes(), _FASTEST)
        values = x.ravel()[differs].astype("<f4", copy=False).tobytes()
        if len(mask) + len(values) < x.nbytes:
            return CHANGED, _SHAPES[CHANGED].pack(*x.shape, len(mask)) + mask + values
    return WHOLE, _SHAPES[WHOLE].pack(*x.shape) + x.astype("<f4", copy=False).tobytes()


def pixels(kind: int, body: bytes, last: Optional[np.ndarray]) -> np.ndarray:
    """The images of a message: float32 (N, C, H, W)."""
    import numpy as np

    if kind not in (WHOLE, CHANGED) or (kind == CHANGED and last is None):
        raise DeviceError(f"images were expected, got a message of kind {kind}")
    try:
        shape = _SHAPES[kind].unpack_from(body)
        rest = memoryview(body)[_SHAPES[kind].size :]
        if kind == WHOLE or last is None:
            return np.frombuffer(rest, "<f4").reshape(shape).astype(np.float32, copy=False)
        mask = np.frombuffer(zlib.decompress(rest[: shape[4]]), np.uint8)
        x = last.copy()
        x.reshape(-1)[np.unpackbits(mask)[: x.size].astype(bool)] = np.frombuffer(rest[shape[4] :], "<f4")
    except (ValueError, IndexError, struct.error, zlib.error) as error:
        raise DeviceError(f"a message of {len(body)} bytes is not one of images: {error}") from error
    return x


def logits(answer: np.ndarray) -> bytes:
    """Logits float32 (N, K) as the body of a message."""
    return _SHAPES[LOGITS].pack(*answer.shape) + answer.astype("<f4", copy=False).tobytes()


def read_logits(kind: int, body: bytes) -> np.ndarray:
    """The logits of a message: float32 (N, K)."""
    import numpy as np

    try:
        if kind != LOGITS:
            raise ValueError(f"it is of kind {kind}")
        shape = _SHAPES[LOGITS].unpack_from(body)
        return np.frombuffer(body, "<f4", offset=_SHAPES[LOGITS].size).reshape(shape).astype(np.float32)
    except (ValueError, struct.error) as error:
        raise DeviceError(f"a message of {len(body)} bytes is not one of logits: {error}") from error
