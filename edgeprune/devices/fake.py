"""A machine that is not there: answers with canned readings, for docs, demonstrations and tests."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Sequence

from edgeprune import serialization
from edgeprune.devices._base import Device
from edgeprune.devices.transport.stream import Answer
from edgeprune.errors import DeviceError, UsageError
from edgeprune.host import FACTS

# Made up, and shaped like a small board: a steady median, and a tail that the 90th and 99th percentile see.
_SHAPE = (
    1.0,
    1.01,
    0.99,
    1.0,
    1.02,
    1.0,
    0.99,
    1.01,
    1.0,
    1.03,
    1.0,
    1.01,
    0.98,
    1.0,
    1.12,
    1.0,
    1.01,
    1.0,
    0.99,
    1.3,
)
CANNED: Dict[str, Any] = {
    "facts": {
        "machine": "aarch64", "system": "Linux", "board": "Canned board", "cpu": "Canned core", "cores": 4,
        "memory_kb": 4000000, "governor": "performance", "clock_khz": 1500000, "clock_max_khz": 1500000,
        "temperature": 45000, "load": "0.00 0.00 0.00", "flags": "fp asimd",
    },
    "runtime": "canned 0.0",
    "latency_s": {"dense": [0.004 * s for s in _SHAPE], "compressed": [0.0025 * s for s in _SHAPE]},
    "memory_bytes": {"dense": 14_000_000, "compressed": 9_000_000},
    "nodes": {
        "dense": [{"name": "conv", "op": "Conv", "seconds": 0.0036, "macs": 40000000, "bytes": 3000000}],
        "compressed": [{"name": "conv", "op": "Conv", "seconds": 0.0022, "macs": 20000000, "bytes": 2000000}],
    },
    "classes": 10,
}  # fmt: skip
_FOLDER = "edgeprune-fake-"
_MOST_CLASSES = 10**5


@dataclass(frozen=True)
class Fake(Device):
    """Canned readings. `address` is a JSON file whose keys replace the built-in ones (docs/devices.md)."""

    address: str = ""

    @property
    def name(self) -> str:
        """As Device.name."""
        return "fake"

    def run(self, argv: Sequence[str], stdin: str, timeout_s: float) -> Answer:
        """As Device.run, for the commands that measuring needs; status 127 for any other."""
        plain = [a for a in argv if a != "env" and not (argv[0] == "env" and "=" in a)]
        if plain == ["sh", "-c", FACTS]:
            return Answer(0, "".join(f"{k}={v}\n" for k, v in self._readings()["facts"].items()), "")
        if plain[:2] == ["mktemp", "-d"]:
            return Answer(0, tempfile.mkdtemp(prefix=_FOLDER) + "\n", "")
        if plain[:2] == ["rm", "-rf"] and Path(plain[2]).name.startswith(_FOLDER):
            shutil.rmtree(plain[2], ignore_errors=True)
            return Answer(0, "", "")
        if plain == self.agent():
            return Answer(0, json.dumps(canned_row(json.loads(stdin), self._readings())), "")
        return Answer(127, "", f"fake: {plain[0]}: no such command")

    def put(self, here: Path, there: str) -> None:
        """As Device.put; the copy lies in a temporary folder of this machine."""
        _copy(here, Path(there))

    def get(self, there: str, here: Path) -> None:
        """As Device.get."""
        _copy(Path(there), here)

    def agent(self) -> List[str]:
        """As Device.agent."""
        return ["edgeprune-agent"]

    def _readings(self) -> Dict[str, Any]:
        if not self.address:
            return CANNED
        try:
            given = serialization.load(Path(self.address))
        except (OSError, ValueError) as error:
            raise UsageError(f"--device fake:{self.address}: not a readable JSON file: {error}") from error
        if not isinstance(given, dict) or not set(given) <= set(CANNED):
            raise UsageError(f"{self.address} must be an object with some of the keys {', '.join(CANNED)}")
        for key, value in given.items():
            if not _like(value, key):
                raise UsageError(f"{self.address}: {key} = {value!r:.60} must be like {CANNED[key]!r:.60}")
        return {**CANNED, **given}


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e18


# What each entry of a table is.
_ENTRIES: Dict[str, Callable[[Any], bool]] = {
    "facts": lambda fact: isinstance(fact, (str, int, float)),
    "latency_s": lambda times: isinstance(times, list) and bool(times) and all(map(_number, times)),
    "memory_bytes": _number,
    "nodes": lambda rows: isinstance(rows, list),
}


def _like(value: Any, key: str) -> bool:
    if key in _ENTRIES:
        return isinstance(value, dict) and bool(value) and all(map(_ENTRIES[key], value.values()))
    if key == "classes":
        return type(value) is int and 1 <= value <= _MOST_CLASSES
    return isinstance(value, str) and bool(value)


def canned_row(request: Mapping[str, Any], readings: Mapping[str, Any]) -> Dict[str, Any]:
    """The reply to a request, from readings that are given."""
    op = request["op"]
    if op == "about":
        return {
            "python": "3.8.0",
            "runtime": readings["runtime"],
            "cores": readings["facts"].get("cores", 1),
        }
    if op == "time":
        models = {name: _timed(name, request["iterations"], readings) for name in request["models"]}
        return {
            "models": models,
            "warmup": request["warmup"],
            "block": 5,
            "runtime": readings["runtime"],
            "load": 0.0,
            "priority": "normal",
        }
    if op == "memory":
        added = _of(readings["memory_bytes"], request["name"])
        return {"peak": added, "at_load": added // 2, "baseline": 40_000_000, "runtime": readings["runtime"]}
    if op == "profile":
        return {"nodes": _of(readings["nodes"], request["name"]), "runtime": readings["runtime"]}
    return _predicted(request, readings["classes"])


def _timed(name: str, iterations: int, readings: Mapping[str, Any]) -> Dict[str, Any]:
    wall = [int(s * 1e9) for s in islice(cycle(_of(readings["latency_s"], name)), iterations)]
    return {"wall_ns": wall, "cpu_ns": wall, "batch": 1}


def _predicted(request: Mapping[str, Any], classes: int) -> Dict[str, Any]:
    import numpy as np

    count = len(np.load(request["x"], mmap_mode="r", allow_pickle=False))
    logits = np.zeros((count, classes), dtype=np.float32)
    logits[np.arange(count), np.arange(count) % classes] = 1.0
    np.save(request["out"], logits)
    return {"images": count, "classes": classes}


def _of(table: Mapping[str, Any], name: str) -> Any:
    return table.get(name, next(iter(table.values())))


def _copy(source: Path, destination: Path) -> None:
    try:
        shutil.copyfile(source, destination)
    except OSError as error:
        raise DeviceError(f"{source} can't be copied to {destination}: {error}") from error
