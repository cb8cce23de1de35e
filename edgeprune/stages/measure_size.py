"""What follows from a file alone: its bytes, as it is and after compression."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeprune.errors import UsageError
from edgeprune.nn.onnx_open import data_files
from edgeprune.records import Reading

COUNTED = "counted"
LEVEL = 9
_CHUNK = 2**20


def size(path: Path, *, name: str = "") -> Reading:
    """The bytes of a file, and of those beside it that hold its numbers.

    Raises:
        UsageError: the file is not there.
    """
    try:
        value, beside = path.stat().st_size, data_files(path)
        value += sum(file.stat().st_size for file in beside.values())
    except OSError as error:
        raise UsageError(f"the size of {path} can't be had: {error}") from error
    return Reading("size", float(value), "B", 1, None, COUNTED, name or path.name, _files(path, beside))


def compressed_size(path: Path, *, name: str = "") -> Reading:
    """The bytes of the same after deflate at its highest level (a zlib stream), as a download or an archive has it.

    Raises:
        UsageError: the file can't be read.
    """
    packer, value = zlib.compressobj(LEVEL), 0
    try:
        beside = data_files(path)
        for part in (path, *beside.values()):
            with part.open("rb") as file:
                while chunk := file.read(_CHUNK):
                    value += len(packer.compress(chunk))
    except OSError as error:
        raise UsageError(f"the compressed size of {path} can't be had: {error}") from error
    value += len(packer.flush())
    conditions = {**_files(path, beside), "compression": f"deflate level {LEVEL} (zlib)"}
    return Reading("compressed_size", float(value), "B", 1, None, COUNTED, name or path.name, conditions)


def _files(path: Path, beside: Mapping[str, Path]) -> dict[str, Any]:
    return {"file": path.name, **({"data_files": list(beside)} if beside else {})}
