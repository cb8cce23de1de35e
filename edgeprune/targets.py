"""Where targets/ and calibration/ are, in a wheel and in a checkout, and how a target is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List, Mapping, Tuple

from edgeprune import host
from edgeprune.errors import UsageError
from edgeprune.quantities import check_choice, number, suggest
from edgeprune.records import Target

PRECISIONS = ("fp32", "fp16", "int8")
SCHEMES = ("u8", "s8")
# Of a whole number of TOML, besides its sign.
WHOLE_BITS = 63
LOWEST_OPSET = 7  # the oldest that ONNX Runtime still reads
_KINDS: Mapping[str, type] = {
    "title": str,
    "device": str,
    "runtime": str,
    "precisions": list,
    "multiple_of": dict,
    "memory": str,
    "bandwidth": str,
    "peak": dict,
    "opset": int,
    "int8": str,
    "setup": dict,
    "board": str,
}
_OPTIONAL = {"setup", "board"}


def folder(name: str) -> Path:
    """The folder "targets" or "calibration" of this installation: of a wheel, or of a checkout."""
    here = Path(__file__).resolve().parent
    for candidate in (here / "_data" / name, here.parent / name):
        if candidate.is_dir():
            return candidate
    raise UsageError(f"the folder {name!r} is missing beside {here}", "reinstall edgeprune")


def names(name: str) -> List[str]:
    """The bare names that "targets" or "calibration" offers, sorted."""
    return sorted(p.stem for p in folder(name).glob("*.toml"))


def resolve(kind: str, name: str) -> Path:
    """A bare name is a bundled file; anything with "/" or ending in ".toml" is a path."""
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
    """Parse a TOML file."""
    try:
        return parse_toml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: {error}") from error


def parse_toml(text: str) -> Dict[str, Any]:
    """Parse a TOML text; a ValueError also where it is nested too deep or has an integer of more than 64 bits."""
    import tomllib

    try:
        table = tomllib.loads(text)
        pending: List[Any] = [table]
        while pending:
            value = pending.pop()
            if isinstance(value, int) and value.bit_length() > WHOLE_BITS:
                raise ValueError(
                    f"a whole number of {value.bit_length() + 1} bits, TOML has {WHOLE_BITS + 1}"
                )
            if isinstance(value, (dict, list)):
                pending.extend(value.values() if isinstance(value, dict) else value)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    return table


def target(name: str) -> Target:
    """Read a target by bare name or path. A file may say `alias = "other"` and nothing else.

    A file with a table `[cpu.KIND]` for each of `machine.CPU_KINDS` is about the machine it runs on: the kind's
    channel multiples are taken, and the memory and the cores are read from the system.
    """
    path = resolve("targets", name)
    table = read_toml(path)
    if set(table) == {"alias"}:
        path = resolve("targets", str(table["alias"]))
        table = read_toml(path)
    if "cpu" in table:
        table = _of_this_machine(path, table, host.this())
    _check_keys(path, table)
    check_choice(f"{path}: int8", table["int8"], SCHEMES)
    return Target(
        name=path.stem,
        title=table["title"],
        device=table["device"],
        runtime=table["runtime"],
        precisions=_precisions(path, table["precisions"]),
        multiple_of=_multiples(path, table["multiple_of"]),
        memory_bytes=int(_bytes(path, table, "memory")),
        bandwidth=_bytes(path, table, "bandwidth"),
        peak=_peaks(path, table["peak"]),
        opset=_opset(path, table["opset"]),
        int8=table["int8"],
        setup=dict(table.get("setup", {})),
        board=table.get("board", ""),
    )


def _of_this_machine(path: Path, table: Mapping[str, Any], here: host.Machine) -> Dict[str, Any]:
    kinds = table["cpu"]
    if not isinstance(kinds, dict) or not isinstance(kinds.get(here.cpu), dict):
        raise UsageError(
            f"{path}: no table [cpu.{here.cpu}] for this machine", f"kinds are {', '.join(host.CPU_KINDS)}"
        )
    setup = {"cpu": here.cpu, "cores": here.cores, **table.get("setup", {})}
    rest = {key: value for key, value in table.items() if key != "cpu"}
    return {"memory": f"{here.memory_bytes} B", "multiple_of": kinds[here.cpu], **rest, "setup": setup}


def _check_keys(path: Path, table: Mapping[str, Any]) -> None:
    for key, value in table.items():
        if key not in _KINDS:
            raise UsageError(f"{path}: unknown key {key!r}", suggest(key, _KINDS))
        if not isinstance(value, _KINDS[key]) or isinstance(value, bool):
            raise UsageError(f"{path}: {key} = {value!r} must be of type {_KINDS[key].__name__}")
    missing = sorted(set(_KINDS) - set(table) - _OPTIONAL)
    if missing:
        raise UsageError(
            f"{path}: missing {', '.join(missing)}", "targets/raspberry-pi-5.toml of edgeprune has them all"
        )


def _precisions(path: Path, values: List[Any]) -> Tuple[str, ...]:
    wrong = [v for v in values if v not in PRECISIONS]
    if wrong or not values:
        raise UsageError(f"{path}: precisions = {values!r} must name at least one of {', '.join(PRECISIONS)}")
    return tuple(values)


def _multiples(path: Path, table: Mapping[str, Any]) -> Dict[str, int]:
    for key, value in table.items():
        if key not in PRECISIONS or type(value) is not int or value < 1:
            raise UsageError(
                f"{path}: multiple_of.{key} = {value!r} must be a whole number >= 1 for one of {PRECISIONS}"
            )
    return {key: int(table.get(key, 1)) for key in PRECISIONS}


def _peaks(path: Path, table: Mapping[str, Any]) -> Dict[str, float]:
    for key, value in table.items():
        if key not in PRECISIONS or type(value) not in (int, float) or not 0 < value < float("inf"):
            raise UsageError(
                f"{path}: peak.{key} = {value!r} must be operations per second, > 0, for one of {PRECISIONS}"
            )
    return {key: float(value) for key, value in table.items()}


def _bytes(path: Path, table: Mapping[str, Any], key: str) -> float:
    try:
        value = number(table[key], "B")
    except UsageError as error:
        raise UsageError(f"{path}: {key} = {error.message}", error.hint) from error
    if value < 0:
        raise UsageError(f"{path}: {key} = {table[key]!r} must not be negative")
    return value


def _opset(path: Path, value: int) -> int:
    if value < LOWEST_OPSET:
        raise UsageError(f"{path}: opset = {value} must be at least {LOWEST_OPSET}")
    return value
