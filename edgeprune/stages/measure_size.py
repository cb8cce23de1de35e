"""What follows from a file alone: its bytes, as it is and after compression."""

from __future__ import annotations

import zlib
from pathlib import Path

from edgeprune.errors import UsageError
from edgeprune.records import Reading

COUNTED = "counted"
LEVEL = 9
_CHUNK = 2**20


def size(path: Path, *, name: str = "") -> Reading:
    """The bytes of a file.

    Raises:
        UsageError: the file is not there.
    """
    try:
        value = path.stat().st_size
    except OSError as error:
        raise UsageError(f"the size of {path} can't be had: {error}") from error
    return Reading("size", float(value), "B", 1, None, COUNTED, name or path.name, {"file": path.name})


def compressed_size(path: Path, *, name: str = "") -> Reading:
    """The bytes of a file after deflate at its highest level (a zlib stream), as a download or an archive has it.

    Raises:
        UsageError: the file can't be read.
    """
    packer, value = zlib.compressobj(LEVEL), 0
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                value += len(packer.compress(chunk))
    except OSError as error:
        raise UsageError(f"the compressed size of {path} can't be had: {error}") from error
    value += len(packer.flush())
    conditions = {"file": path.name, "compression": f"deflate level {LEVEL} (zlib)"}
    return Reading("compressed_size", float(value), "B", 1, None, COUNTED, name or path.name, conditions)
