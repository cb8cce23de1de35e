"""Where targets/ and calibration/ are, in a wheel and in a checkout, and how a target is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List, Mapping

from edgeprune.errors import UsageError
from edgeprune.quantities import number, suggest
from edgeprune.records import Target

PRECISIONS = ("fp32", "fp16", "int8")


def folder(name: str) -> Path:
    """The folder "targets" or "calibration" that came with this installation.

    Raises:
        UsageError: neither a wheel's nor a checkout's folder is there.
    """
    here = Path(__file__).resolve().parent
    for candidate in (here / "_data" / name, here.parent / name):
        if candidate.is_dir():
            return candidate
    raise UsageError(f"the folder {name!r} is missing beside {here}", "reinstall edgeprune")


def names(name: str) -> List[str]:
    """The bare names that "targets" or "calibration" offers, sorted."""
    return sorted(p.stem for p in folder(name).glob("*.toml"))


def resolve(kind: str, name: str) -> Path:
    """A bare name is a bundled file; anything with "/" or ending in ".toml" is a path.

    Raises:
        UsageError: no such file; says the closest name.
    """
    if "/" in name or name.endswith(".toml"):
        path = Path(name)
        if not path.is_file():
            raise UsageError(f"{kind}: no file {name!r}")
        return path
    path = folder(kind) / f"{name}.toml"
    if not path.is_file():
        raise UsageError(f"no {kind.rstrip('s')} is named {name!r}", suggest(name, names(kind)))
    return path


def read_toml(path: Path) -> Dict[str, Any]:
    """Parse a TOML file.

    Raises:
        UsageError: not readable or not TOML; says the line.
    """
    import tomllib

    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path}: {error}") from error


def target(name: str) -> Target:
    """Read a target by bare name or path. A file may say `alias = "other"` and nothing else.

    Raises:
        UsageError: no such target, an unknown or a missing key, a wrong value.
    """
    path = resolve("targets", name)
    table = read_toml(path)
    if set(table) == {"alias"}:
        return target(str(table["alias"]))
    known = {"title", "device", "runtime", "precisions", "multiple_of", "memory", "bandwidth", "peak", "opset", "setup"}
    for key in table:
        if key not in known:
            raise UsageError(f"{path}: unknown key {key!r}", suggest(key, known))
    missing = sorted(known - set(table) - {"setup"})
    if missing:
        raise UsageError(f"{path}: missing {', '.join(missing)}")
    return Target(
        name=path.stem,
        title=str(table["title"]),
        device=str(table["device"]),
        runtime=str(table["runtime"]),
        precisions=tuple(table["precisions"]),
        multiple_of=_multiples(path, table["multiple_of"]),
        memory_bytes=int(number(str(table["memory"]), "B")),
        bandwidth=number(str(table["bandwidth"]), "B"),
        peak={key: float(value) for key, value in table["peak"].items()},
        opset=int(table["opset"]),
        setup=dict(table.get("setup", {})),
    )


def _multiples(path: Path, table: Mapping[str, Any]) -> Dict[str, int]:
    for key, value in table.items():
        if key not in PRECISIONS or not isinstance(value, int) or value < 1:
            raise UsageError(f"{path}: multiple_of.{key} = {value!r} must be a whole number >= 1 for one of {PRECISIONS}")
    return {key: int(table.get(key, 1)) for key in PRECISIONS}
