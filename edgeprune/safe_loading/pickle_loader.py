"""Pickled networks and checkpoints, loaded so that no code in the file runs.

Four layers, each enough by itself against the attacks known for it: the file's globals must be names of a short list
or classes that are nn.Modules; every operation of the pickle is judged with its arguments (`pickle_interpreter`) before
anything is made; torch's own restricted unpickler (`weights_only=True`) does the making, with just those classes; and
the networks that were made are checked once more.
"""

import importlib
import io
import logging
import pickle
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from edgeprune.errors import MissingDependency, ModelError, UnsafeModel, UsageError
from edgeprune.safe_loading.formats import LEGACY_MAGIC, records
from edgeprune.safe_loading.pickle_interpreter import faults, globals_of
from edgeprune.safe_loading.pickle_policy import DATA, class_permit, data_objects, fault_in
from edgeprune.safe_loading.user_code import (
    USER_CODE_ERRORS,
    import_library,
    importable_here,
    prepare_torchvision,
)

_LOG = logging.getLogger("edgeprune")
_MODULE_HOMES = ("torch.nn.modules.", "torchvision.", "timm.")
# magic, protocol version, system information, the object itself, the keys of its storages
_LEGACY_PICKLES = 5


def load_pickle(data: bytes, where: str, *, allow_class: Sequence[str] = (), trust: bool = False) -> Any:
    """Unpickle what torch.save wrote: a network, a state dict, or a checkpoint that holds one.

    Args:
        trust: load as Python's own unpickler does, running whatever the file says; warns.
    """
    if trust:
        return _load_trusted(data, where)
    named = {name: _user_class(name) for name in allow_class}
    scanned, count = _pickles_in(data, where)
    names = globals_of(scanned, count=count)
    classes = {name: cls for name in names if (cls := named.get(name) or _library_class(name)) is not None}
    permits = {**DATA, **{name: class_permit(cls, vouched=name in named) for name, cls in classes.items()}}
    try:
        found = faults(scanned, permits, count=count)
    except ValueError as error:
        raise ModelError(f"{where} is corrupt or truncated: {error}", "save it again") from error
    if found:
        refused = [name for name in names if name not in permits]
        raise _unsafe(where, refused, found)
    # A pair gives the class under the name that the file uses, which may be an older one than the class's own.
    loaded = _load_restricted(
        data, where, [*((cls, name) for name, cls in classes.items()), *data_objects(names)]
    )
    if fault := fault_in(loaded):
        raise _unsafe(where, [], [fault])
    return loaded


def _load_restricted(data: bytes, where: str, safe: list[Any]) -> Any:
    try:
        with torch.serialization.safe_globals(safe):
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _unsafe(where, [], [str(error).splitlines()[0]]) from error
    except USER_CODE_ERRORS as error:
        raise ModelError(f"{where} is corrupt or truncated: {_first_line(error)}", "save it again") from error


def _load_trusted(data: bytes, where: str) -> Any:
    _LOG.warning("--trust-pickle: loading %s runs whatever code is in it", where)
    prepare_torchvision()
    plain = not data.startswith((b"PK\x03\x04", LEGACY_MAGIC))
    try:
        with importable_here():
            if plain:
                return pickle.loads(data)
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)
    except ModuleNotFoundError as error:
        missing = (error.name or "?").split(".")[0]
        raise MissingDependency(
            f"{where} needs the package {missing}", f"pip install {missing}, or run beside its file"
        ) from error
    except USER_CODE_ERRORS as error:
        raise ModelError(
            f"{where} can't be unpickled: {type(error).__name__}: {_first_line(error)}"
        ) from error


def _pickles_in(data: bytes, where: str) -> tuple[bytes, int]:
    if data.startswith(b"PK\x03\x04"):
        reader, _ = records(data, where)
        try:
            return reader.get_record("data.pkl"), 1
        except (RuntimeError, ValueError) as error:
            raise ModelError(
                f"{where} is a corrupt archive: {_first_line(error)}", "save it again"
            ) from error
    if data.startswith(LEGACY_MAGIC):
        return data, _LEGACY_PICKLES
    names = globals_of(data)
    if names:
        raise _unsafe(where, names, ["a plain pickle, which torch.save did not write"])
    raise ModelError(
        f"{where} is not a file of torch.save, nor any other supported model file",
        "save it again with torch.save",
    )


def _user_class(name: str) -> type:
    module, _, attribute = name.rpartition(".")
    if not module:
        raise UsageError(f"--allow-class {name!r} must be package.Class")
    prepare_torchvision()
    try:
        with importable_here():
            value = getattr(importlib.import_module(module), attribute, None)
    except ModuleNotFoundError as error:
        missing = (error.name or module).split(".")[0]
        hint = f"pip install {missing}, or run in the directory that holds it"
        raise MissingDependency(f"--allow-class {name}: no package {missing}", hint) from error
    except USER_CODE_ERRORS as error:
        raise UsageError(
            f"--allow-class {name}: importing {module} failed: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(value, type):
        kind = "does not exist" if value is None else f"is a {type(value).__name__}, not a class"
        raise UsageError(
            f"--allow-class {name}: it {kind}",
            "only classes can be allowed; --trust-pickle is the last resort",
        )
    return value


def _library_class(name: str) -> type | None:
    """The nn.Module class of torch, torchvision or timm with that name; None when it is anything else."""
    home = next((h for h in _MODULE_HOMES if name.startswith(h)), "")
    module, _, attribute = name.rpartition(".")
    if not home:
        return None
    package = home.rstrip(".").split(".")[0]
    if package != "torch" and package not in sys.modules:
        import_library(package, f"the file holds {name}, so it")
    # Only what the library itself imports: a file's say-so never imports a module.
    value = getattr(sys.modules.get(module), attribute, None)
    if (
        isinstance(value, type)
        and issubclass(value, nn.Module)
        and value.__module__.startswith(_MODULE_HOMES)
    ):
        return value
    return None


def _unsafe(where: str, refused: Sequence[str], found: Sequence[str]) -> UnsafeModel:
    shown = refused or found
    listed = ", ".join(shown[:12]) + (f" and {len(shown) - 12} more" if len(shown) > 12 else "")
    what = "names globals that are not allowed" if refused else "would do what is not allowed"
    flags = " ".join(f"--allow-class {name}" for name in refused if _may_be_module(name))
    parts = [
        f"if you trust them, add {flags}" if flags else "",
        "save only the weights (model.state_dict()) and give --arch",
        "--trust-pickle runs whatever the file says: the last resort",
    ]
    return UnsafeModel(f"{where} was not loaded: it {what}: {listed}", "; or ".join(p for p in parts if p))


def _may_be_module(name: str) -> bool:
    """Whether --allow-class could help: a module class, or, when it isn't imported, a name like a class's."""
    module, _, attribute = name.rpartition(".")
    value = getattr(sys.modules.get(module), attribute, None)
    if value is not None:
        return isinstance(value, type) and issubclass(value, nn.Module)
    return (
        module not in ("", "__main__")
        and module.split(".")[0] not in sys.stdlib_module_names
        and attribute[:1].isupper()
    )


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
