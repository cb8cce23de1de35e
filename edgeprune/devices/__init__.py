"""How a machine is reached: three verbs (run, put, get), and what is built on them for every device.

Light: keeps to Python 3.8 syntax and imports nothing heavy.
"""

from __future__ import annotations

import json
import re
import shlex
from abc import ABC, abstractmethod
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Type

from edgeprune import plugins
from edgeprune.errors import (
    DeviceError,
    EdgepruneError,
    MissingDependency,
    ModelError,
    UnsupportedModel,
    UsageError,
)
from edgeprune.quantities import suggest

# One shell script, so that a far machine is asked once; a line that can't be had is left out or empty.
FACTS = r"""
say() { printf '%s=%s\n' "$1" "$2"; }
first() { for f in "$@"; do [ -r "$f" ] && head -n 1 "$f" 2>/dev/null | tr -d '\000' && return; done; }
freq=/sys/devices/system/cpu/cpu0/cpufreq
say machine "$(uname -m)"
say system "$(uname -s)"
say release "$(uname -r)"
say cores "$(getconf _NPROCESSORS_ONLN 2>/dev/null)"
say board "$(first /proc/device-tree/model)"
say cpu "$(sed -n 's/^model name[^:]*: *//p' /proc/cpuinfo 2>/dev/null | head -n 1)"
say flags "$(sed -n -e 's/^flags[^:]*: *//p' -e 's/^Features[^:]*: *//p' /proc/cpuinfo 2>/dev/null | head -n 1)"
say memory_kb "$(sed -n 's/^MemTotal: *\([0-9]*\).*/\1/p' /proc/meminfo 2>/dev/null)"
say governor "$(first $freq/scaling_governor)"
say clock_khz "$(first $freq/scaling_cur_freq $freq/cpuinfo_cur_freq)"
say clock_max_khz "$(first $freq/cpuinfo_max_freq)"
say clock_mhz "$(sed -n 's/^cpu MHz[^:]*: *//p' /proc/cpuinfo 2>/dev/null | head -n 1)"
say load "$(first /proc/loadavg)"
for zone in /sys/class/thermal/thermal_zone*/temp; do say temperature "$(first $zone)"; done
say power_mode "$(nvpmodel -q 2>/dev/null | sed -n 's/^NV Power Mode: *//p')"
say brand "$(sysctl -n machdep.cpu.brand_string 2>/dev/null)"
true
"""
_FACTS_TIMEOUT_S = 30.0
_ERRORS: Dict[str, Type[EdgepruneError]] = {
    e.__name__: e for e in (MissingDependency, ModelError, UnsupportedModel, UsageError)
}


class Answer(NamedTuple):
    """What a command left: exit status (negative: killed by that signal), and its two outputs."""

    status: int
    stdout: str
    stderr: str


class Device(ABC):
    """A machine that runs commands."""

    @property
    @abstractmethod
    def name(self) -> str:
        """How people call it: "local", "fake"."""

    @abstractmethod
    def run(self, argv: Sequence[str], stdin: str, timeout_s: float) -> Answer:
        """Run a command there and wait for it.

        Raises:
            DeviceError: it can't be started, or took longer than `timeout_s`.
        """

    @abstractmethod
    def put(self, here: Path, there: str) -> None:
        """Copy a file to the device.

        Raises:
            DeviceError: it could not be copied.
        """

    @abstractmethod
    def get(self, there: str, here: Path) -> None:
        """Copy a file from the device.

        Raises:
            DeviceError: it could not be copied.
        """

    @abstractmethod
    def agent(self) -> List[str]:
        """The command that starts `edgeprune.agent` on the device."""

    def facts(self) -> Dict[str, Any]:
        """What the machine says about itself; what it does not say is absent.

        machine, system, release, board, cpu, power_mode, governor: text. cores: count. memory_bytes.
        clock_hz, clock_max_hz: of the first core. temperature_c: of the hottest zone. load: of the last
        minute. flags: the CPU's features, sorted.

        Raises:
            DeviceError: the machine does not answer.
        """
        answer = self.run(["sh", "-c", FACTS], "", _FACTS_TIMEOUT_S)
        if answer.status != 0:
            raise _failed(self.name, ["sh", "-c", "(facts)"], answer)
        return _parse_facts(answer.stdout)

    def where(self) -> str:
        """The device and its kind of processor, as readings name the place: "local x86_64"."""
        return f"{self.name} {self.facts().get('machine', '')}".strip()

    def check(self, argv: Sequence[str], timeout_s: float = 60.0) -> str:
        """Run a command that must succeed, and give what it printed.

        Raises:
            DeviceError: it failed; says argv, status and the last lines of stderr.
        """
        answer = self.run(argv, "", timeout_s)
        if answer.status != 0:
            raise _failed(self.name, argv, answer)
        return answer.stdout

    @contextmanager
    def folder(self) -> Iterator[str]:
        """A new empty folder on the device, gone with all that is in it afterwards."""
        path = self.check(["mktemp", "-d", "-t", "edgeprune-XXXXXX"]).strip()
        try:
            yield path
        finally:
            self.run(["rm", "-rf", path], "", 60.0)

    @contextmanager
    def holding(self, files: Mapping[str, Path]) -> Iterator[Dict[str, str]]:
        """Copies of files on the device, name -> path there, gone afterwards.

        Raises:
            UsageError: a file is not there.
            DeviceError: it could not be copied.
        """
        with self.folder() as folder:
            there = {}
            for number, (name, here) in enumerate(files.items()):
                if not here.is_file():
                    raise UsageError(f"no file {str(here)!r}")
                there[name] = f"{folder}/{number}-{here.name}"
                self.put(here, there[name])
            yield there

    def ask(
        self, request: Mapping[str, Any], *, timeout_s: float, env: Optional[Mapping[str, str]] = None
    ) -> Dict[str, Any]:
        """Send one request to the agent on the device, in a fresh process, and give its answer.

        Raises:
            DeviceError: it crashed, took too long or answered with something else than a JSON object.
            MissingDependency, ModelError, UsageError: what the agent itself said.
        """
        prefix = ["env", *(f"{k}={v}" for k, v in env.items())] if env else []
        argv = [*prefix, *self.agent()]
        answer = self.run(argv, json.dumps(dict(request)), timeout_s)
        try:
            data = json.loads(answer.stdout)
        except (ValueError, RecursionError):
            data = None
        if isinstance(data, dict) and isinstance(data.get("error"), str):
            kind = _ERRORS.get(str(data.get("kind")), DeviceError)
            raise kind(f"{data['error']} (on {self.name})", str(data.get("hint", "")))
        if answer.status != 0 or not isinstance(data, dict):
            raise _failed(self.name, argv, answer)
        return data


def device_from_url(url: str) -> Device:
    """The device that a URL names: "local", "fake", "fake:readings.json".

    Raises:
        UsageError: no such device in this version; says which there are.
    """
    scheme, _, address = url.partition(":")
    known = plugins.names("devices")
    if scheme not in known:
        accepted = ", ".join(sorted(known, reverse=True))
        raise UsageError(f"device {url!r} is not in this version; accepted: {accepted}", _hint(scheme, known))
    address = address[2:] if address.startswith("//") else address
    if address and "address" not in plugins.options("devices", scheme):
        raise UsageError(f"device {url!r}: {scheme} takes no address", f"write --device {scheme}")
    device = plugins.build("devices", scheme, {"address": address} if address else {})
    assert isinstance(device, Device)
    return device


def _hint(scheme: str, known: Sequence[str]) -> str:
    close = suggest(scheme, known)
    return close if close.startswith("did you mean") else "measure on this machine with --device local"


def _failed(name: str, argv: Sequence[str], answer: Answer) -> DeviceError:
    how = (
        f"was killed by signal {-answer.status}"
        if answer.status < 0
        else f"ended with status {answer.status}"
    )
    if answer.status == 0:
        how = f"answered with something else than a JSON object: {answer.stdout.strip()[:200]!r}"
    last = " | ".join(line.strip() for line in answer.stderr.strip().splitlines()[-5:])
    command = " ".join(shlex.quote(a) for a in argv)
    return DeviceError(
        f"a command on {name} {how}: {command}; its last words: {last or 'none'}",
        "edgeprune doctor says what is missing",
    )


def _parse_facts(text: str) -> Dict[str, Any]:
    pairs = [line.partition("=")[::2] for line in text.splitlines() if "=" in line]
    said: Dict[str, str] = {key: value.strip() for key, value in pairs if value.strip()}
    facts: Dict[str, Any] = {}
    for key in ("machine", "system", "release", "board", "cpu", "governor", "power_mode"):
        if key in said:
            facts[key] = said[key]
    if "cpu" not in facts and "brand" in said:
        facts["cpu"] = said["brand"]
    numbers: Tuple[Tuple[str, str, float], ...] = (
        ("cores", "cores", 1),
        ("memory_bytes", "memory_kb", 1024),
        ("clock_hz", "clock_mhz", 1e6),
        ("clock_hz", "clock_khz", 1e3),
        ("clock_max_hz", "clock_max_khz", 1e3),
        ("load", "load", 1),
    )
    for key, source, scale in numbers:
        value = _leading_number(said.get(source, ""))
        if value is not None:
            facts[key] = int(value * scale) if key in ("cores", "memory_bytes") else value * scale
    zones = [_leading_number(value) for key, value in pairs if key == "temperature"]
    heat = [z / 1000.0 for z in zones if z is not None and z > 0]
    if heat:
        facts["temperature_c"] = max(heat)
    if "flags" in said:
        facts["flags"] = sorted(said["flags"].split())
    return facts


def _leading_number(text: str) -> Optional[float]:
    match = re.match(r"\s*-?\d+(?:\.\d+)?", text)
    return float(match.group()) if match else None
