"""`.pt2` archives of torch.export: checked before they are loaded, because loading one can run code.

torch 2.13 runs code out of an archive by pickles (sample inputs, weights, constants), by Python expressions (symbolic
sizes, guards), by names that end up in generated source, by operators given as dotted paths, and by modules that a
tree of containers imports. Only what genuine archives hold is accepted.
"""

import contextlib
import io
import json
import logging
import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch._export.serde import schema
from torch._export.serde.serialize import _dict_to_dataclass

from edgeprune.errors import ModelError, UnsafeModel
from edgeprune.safe_loading.formats import records
from edgeprune.safe_loading.names import check_name, short
from edgeprune.safe_loading.pickle_interpreter import faults
from edgeprune.safe_loading.pickle_policy import DATA
from edgeprune.safe_loading.pt2_graph import check_program, parts_of
from edgeprune.safe_loading.user_code import USER_CODE_ERRORS

_MAIN = "models/model.json"
_SAMPLES = "data/sample_inputs/model.pt"
_CONFIGS = {
    "data/weights/model_weights_config.json": "weight",
    "data/constants/model_constants_config.json": "tensor",
}
_FILES = re.compile(
    r"archive_format|archive_version|byteorder|\.data/(version|serialization_id)|models/model\.json"
    r"|data/weights/(weight_\d+|model_weights_config\.json)|data/constants/(tensor_\d+|model_constants_config\.json)"
    r"|data/sample_inputs/model\.pt|extra/[\w.\-]+"
)


def load_pt2(data: bytes, where: str) -> torch.export.ExportedProgram:
    """Vet the bytes of an archive, then load its program from the same bytes."""
    _vet(data, where)
    try:
        with _quiet():
            return torch.export.load(io.BytesIO(data))
    except USER_CODE_ERRORS as error:
        raise ModelError(
            f"{where} can't be loaded by torch {torch.__version__}: {_last_line(error)}", "export it again"
        ) from error


def _vet(data: bytes, where: str) -> None:
    reader, names = records(data, where)
    strange = [n for n in names if not _FILES.fullmatch(n)]
    if strange or len(set(names)) != len(names):
        what = f"holds {strange[0]!r}" if strange else "holds a file twice"
        raise UnsafeModel(
            f"{where} was not loaded: it {what}, which torch.export.save doesn't write", "export it again"
        )
    needed = ("archive_format", "archive_version", _MAIN, _SAMPLES, *_CONFIGS)
    absent = [n for n in needed if n not in names]
    if absent:
        raise ModelError(f"{where} is not a complete .pt2 archive: {absent[0]} is missing", "export it again")
    try:
        check_program(_json(reader, _MAIN), where)
        for name, kind in _CONFIGS.items():
            _check_payloads(_json(reader, name), kind, f"{where}: {name}")
        _check_samples(reader.get_record(_SAMPLES), where)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
        raise ModelError(
            f"{where} is a corrupt .pt2 archive: {_last_line(error)}", "export it again"
        ) from error


def _json(reader: Any, name: str) -> Any:
    return json.loads(reader.get_record(name).decode("utf-8"))


def _check_payloads(table: Any, kind: str, where: str) -> None:
    payloads: Any = _dict_to_dataclass(schema.PayloadConfig, table)
    for name, payload in payloads.config.items():
        check_name(name, where)
        if payload.use_pickle is not False:
            raise UnsafeModel(f"{where} was not loaded: {name} is a pickle, which can run code")
        if not isinstance(payload.path_name, str) or not re.fullmatch(rf"{kind}_\d+", payload.path_name):
            raise UnsafeModel(
                f"{where} was not loaded: {name} lies in {short(payload.path_name)}, expected {kind}_N"
            )
        for part in parts_of(payload.tensor_meta):
            if isinstance(part, schema.SymExpr):
                raise UnsafeModel(f"{where} was not loaded: {name} has a symbolic size")


def _check_samples(data: bytes, where: str) -> None:
    """torch falls back to its unrestricted unpickler when the restricted one refuses the sample inputs."""
    if not data:
        return
    reader, _ = records(data, f"{where}: {_SAMPLES}")
    found = faults(reader.get_record("data.pkl"), DATA)
    if found:
        raise UnsafeModel(f"{where} was not loaded: its sample inputs hold {found[0]}")
    try:
        torch.load(io.BytesIO(data), weights_only=True)
    except USER_CODE_ERRORS as error:
        raise UnsafeModel(
            f"{where} was not loaded: its sample inputs are not just tensors: {_last_line(error)}"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch.export logs a traceback before it raises; the error alone is enough."""
    log = logging.getLogger("torch.export")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
