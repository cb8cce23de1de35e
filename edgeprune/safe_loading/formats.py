"""The kind of a model file, by its content; by its name only where the content does not decide."""

import io
import logging
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

from edgeprune.errors import ModelError, UnsupportedModel
from edgeprune.safe_loading.pickle_interpreter import globals_of

_LOG = logging.getLogger("edgeprune")
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_ZIP = b"PK\x03\x04"
_LONGEST_HEADER = 100_000_000
_KNOWN = "accepted: .pt2 of torch.export, .pt/.pth of torch.save, .safetensors with --arch, a run directory"
_OTHER_SCRIPT = "a TorchScript file of a kind that only its own program reads"
_OTHERS = (
    (0, b"\x89HDF\r\n", "an HDF5 file, as Keras writes"),
    (4, b"TFL3", "a TensorFlow Lite model"),
    (0, b"GGUF", "a GGUF model"),
    (0, b"version https://git-lfs", "a Git LFS pointer, not the file itself: `git lfs pull` fetches it"),
    (0, b"<!DOCTYPE", "a web page, not the file that was to be downloaded"),
    (0, b"<html", "a web page, not the file that was to be downloaded"),
    (0, b"\x1f\x8b", "a gzip archive: unpack it first"),
    (0, b"\xfd7zXZ", "an xz archive: unpack it first"),
    (257, b"ustar", "a tar archive: unpack it first"),
    (0, b"PYTORCH1", _OTHER_SCRIPT),
    (4, b"PTMF", _OTHER_SCRIPT),
)
_MOST_UNPACKED = 100
_CHUNK = 2**20
_BROKEN_ZIP = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    OSError,
    EOFError,
    LookupError,
    RuntimeError,
    ValueError,
)


def kind_of(data: bytes, path: Path) -> str:
    """One of "pt2", "pickle", "safetensors"."""
    if not data:
        raise ModelError(f"{path} is empty", _KNOWN)
    if data.startswith(_ZIP):
        return _archive_kind(data, path)
    if path.suffix == ".safetensors" or _is_safetensors(data):
        return "safetensors"
    # A ModelProto starts with its IR version (field 1), then the producer's name or the graph.
    proto = len(data) > 4 and data[0] == 0x08 and 3 <= data[1] <= 20 and data[2] in (0x12, 0x1A, 0x3A, 0x42)
    if path.suffix == ".onnx" or proto:
        raise UnsupportedModel(
            f"{path} is an ONNX graph, which can't be trained or cut as modules",
            "give the PyTorch model that it was made from, for example as a .pt2: "
            "torch.export.save(torch.export.export(net, (x,)), file)",
        )
    for at, magic, what in _OTHERS:
        if data[at : at + len(magic)].lower() == magic.lower():
            raise ModelError(f"{path} is {what}", _KNOWN)
    if path.suffix == ".py":
        raise ModelError(
            f"{path} is Python code", f"give the weights as MODEL, and this as --arch {path}:CALLABLE"
        )
    if data.startswith(b"\x80") or globals_of(data):
        return "pickle"
    raise ModelError(f"{path} is corrupt or no model file: it starts with {data[:8]!r}", _KNOWN)


def records(data: bytes, path: Path | str) -> tuple[Any, list[str]]:
    """torch's reader of an archive's bytes, and the files in it. Another reader might see others in a forged one."""
    try:
        reader = torch._C.PyTorchFileReader(io.BytesIO(data))
        return reader, list(reader.get_all_records())
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0].removeprefix("PytorchStreamReader ").split(". This is")[0]
        raise ModelError(
            f"{path} is a truncated or corrupt archive: {reason}", "save or copy it again"
        ) from error


def _archive_kind(data: bytes, path: Path) -> str:
    try:
        names = records(data, path)[1]
    except ModelError:
        _refuse_foreign_archive(data, path)
        raise
    if _is_torchscript(names):
        raise _torchscript(path)
    _check_sums(data, path)
    if "archive_format" in names or any(name.startswith("models/") for name in names):
        return "pt2"
    if "data.pkl" in names:
        return "pickle"
    raise ModelError(f"{path} is an archive, but holds no model: {', '.join(names[:3])}", _KNOWN)


def _is_torchscript(names: list[str]) -> bool:
    """torch.jit.save writes `constants.pkl` today; torch 1.0 wrote `model.json`, mobile files have `bytecode.pkl`."""
    coded = any(name.startswith("code/") and name.endswith(".py") for name in names)
    return coded or any(name in ("constants.pkl", "bytecode.pkl", "model.json") for name in names)


def _torchscript(path: Path) -> UnsupportedModel:
    return UnsupportedModel(
        f"{path} is TorchScript, which can run code when it is loaded, so it is not loaded",
        "if you trust it, take its weights out and give them with --arch file.py:CALLABLE of its Python class: "
        f"""python -c 'import torch; torch.save(torch.jit.load("{path}").state_dict(), "weights.pt")'; """
        "or export that class as a .pt2: torch.export.save(torch.export.export(net.eval(), (x,)), file)",
    )


def _check_sums(data: bytes, path: Path) -> None:
    """torch writes a CRC-32 for each member of an archive, but does not check it when it loads the file."""
    name = ""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
            if sum(member.file_size for member in members) > _MOST_UNPACKED * len(data):
                raise ModelError(
                    f"{path} unpacks to more than {_MOST_UNPACKED} times its size", "save it again"
                )
            if not any(member.CRC for member in members):
                _LOG.warning("%s has no checksums, so damage in its weights can't be seen", path)
                return
            for member in members:
                name = member.filename
                with archive.open(member) as content:
                    while content.read(_CHUNK):
                        pass
    except _BROKEN_ZIP as error:
        what = f"its member {name!r} is not as it was written" if name else "its table of contents is damaged"
        raise ModelError(f"{path} is a corrupt archive: {what} ({error})", "copy or save it again") from error


def _refuse_foreign_archive(data: bytes, path: Path) -> None:
    """A whole archive that torch did not write gets another message than a damaged one."""
    try:
        names = zipfile.ZipFile(io.BytesIO(data)).namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError):
        return
    if "serialized_exported_program.json" in names:
        raise ModelError(
            f"{path} is a .pt2 of torch 2.7 or older", "export and save it again with the current torch"
        )
    if not any("/" in name for name in names):
        raise ModelError(f"{path} is a zip archive, but holds no model: {', '.join(names[:3])}", _KNOWN)


def _is_safetensors(data: bytes) -> bool:
    length = int.from_bytes(data[:8], "little")
    return 2 <= length <= min(len(data), _LONGEST_HEADER) and data[8:9] == b"{"
