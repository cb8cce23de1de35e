"""An ONNX file opened with all its numbers, also those in files beside it; nothing outside its folder is read.

Imports no torch and no runtime, as measuring must not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

import onnx
from google.protobuf.message import DecodeError, Message
from onnx import ModelProto, TensorProto, external_data_helper, helper

from edgeprune.errors import ModelError, UnsafeModel, UsageError

HINT = "give an .onnx file or a finished run directory; `edgeprune compress` and `why` take PyTorch models"
_BESIDE = (
    "copy the ONNX file and its data files into one folder, or save all in one file with the onnx package"
)


def opened(path: Path, *, weights: bool = True) -> ModelProto:
    """The model of an ONNX file, with the numbers that lie in files beside it.

    Args:
        weights: False leaves those numbers where they are; their files are looked at all the same.

    Raises:
        UsageError: it is not a readable ONNX file, a name in it is not UTF-8, or a file beside it is missing.
        UnsafeModel: its data lie outside its folder. ModelError: a file beside it is too short for what it should hold.
    """
    model = _parsed(path)
    tensors = [t for t in _tensors(model) if t.data_location == TensorProto.EXTERNAL]
    for tensor in tensors:
        _check_data(tensor, path)
    try:
        for tensor in tensors if weights else ():
            external_data_helper.load_external_data_for_tensor(tensor, str(path.parent))
    except (OSError, RuntimeError, ValueError, TypeError, onnx.checker.ValidationError) as error:
        raise ModelError(f"the data of {path} can't be read: {error}") from error
    return model


def data_files(path: Path) -> dict[str, Path]:
    """The files beside an ONNX file that hold its numbers, by what the file calls them; none for any other file.

    Raises:
        As `opened`.
    """
    if path.suffix != ".onnx" or not path.is_file():
        return {}
    try:
        model = _parsed(path)
    except UsageError:  # whoever runs it says what is wrong with it
        return {}
    tensors = [t for t in _tensors(model) if t.data_location == TensorProto.EXTERNAL]
    for tensor in tensors:
        _check_data(tensor, path)
    names = dict.fromkeys(_entry(tensor.external_data, "location") for tensor in tensors)
    return {name: path.parent / name for name in names}


def moved(path: Path, places: Mapping[str, str]) -> bytes:
    """An ONNX file whose data files have other names. places: the old name of each -> the new one."""
    model = opened(path, weights=False)
    for tensor in _tensors(model):
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = places[entry.value]
    return model.SerializeToString()


def _parsed(path: Path) -> ModelProto:
    model = ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
        for _ in _tensors(model):
            pass
    except UnicodeDecodeError as error:
        name = error.object.decode("utf-8", "backslashreplace")
        raise UsageError(
            f"{path} has the name '{name}', which is not UTF-8", "export the file again"
        ) from error
    except (OSError, DecodeError, ValueError) as error:
        raise UsageError(f"{path} is not a readable ONNX file: {error}", HINT) from error
    if not model.graph.node:
        raise UsageError(f"{path} is not a readable ONNX file: there is no graph in it", HINT)
    return model


def _tensors(message: Message) -> Iterator[TensorProto]:
    """All tensors in a message; every name is read on the way, which fails on one that is not UTF-8."""
    if isinstance(message, TensorProto):
        yield message
    for field, value in message.ListFields():
        if field.type == field.TYPE_STRING:
            for text in [value] if isinstance(value, (str, bytes)) else value:
                if isinstance(text, bytes):  # what protobuf gives where it is not UTF-8
                    text.decode("utf-8")
        elif field.message_type is not None:
            for part in [value] if isinstance(value, Message) else value:
                yield from _tensors(part)


def _entry(place: Any, key: str) -> str:
    return next((entry.value for entry in place if entry.key == key), "")


def _check_data(tensor: TensorProto, path: Path) -> None:
    """Refuse a tensor whose data are outside the folder, not there, or not all there."""
    location, what = _entry(tensor.external_data, "location"), f"{path}: the data of {tensor.name!r}"
    inside, file = PurePosixPath(location), path.parent / location
    steps = [path.parent.joinpath(*inside.parts[: i + 1]) for i in range(len(inside.parts))]
    if not steps or inside.is_absolute() or ".." in inside.parts or "\\" in location or "\0" in location:
        raise UnsafeModel(
            f"{what} lie at {location!r}; accepted is a file in the folder of the ONNX file", _BESIDE
        )
    if any(step.is_symlink() for step in steps):
        raise UnsafeModel(f"{what} lie at {location!r}, which is a symbolic link", _BESIDE)
    if not file.is_file():
        raise UsageError(f"{what} are in the file {location!r}, which is not in {path.parent}", _BESIDE)
    try:
        offset = int(_entry(tensor.external_data, "offset") or 0)
        length = int(_entry(tensor.external_data, "length") or file.stat().st_size - offset)
        needed = prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{what} can't be found in {location!r}: {error}") from error
    # Two numbers of 4 bits share a byte.
    packed = tensor.data_type in (TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1)
    least = -(-needed // 2) if packed else needed
    if min(offset, length) < 0 or offset + length > file.stat().st_size or length < least:
        raise ModelError(
            f"{what} are {least} bytes from byte {offset} of {location!r} on, which has {file.stat().st_size}",
            "copy the file again: it is not whole, or of another model",
        )
