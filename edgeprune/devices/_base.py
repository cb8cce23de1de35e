"""How a machine is reached: three verbs (run, put, get), and what is built on them for every device."""

from __future__ import annotations

import json
import re
import shlex
from abc import ABC, abstractmethod
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Type

from edgeprune import agent, host, plugins, serialization
from edgeprune.devices import _ort_perf_test
from edgeprune.devices.transport.shell import SLOWEST, Shell
from edgeprune.devices.transport.stream import START_S, Answer, InteractiveCommand
from edgeprune.errors import (
    LESS,
    DeviceError,
    EdgepruneError,
    MissingDependency,
    ModelError,
    NoRoom,
    ParityError,
    UnsupportedModel,
    UsageError,
    is_memory,
)
from edgeprune.host import FACTS
from edgeprune.quantities import suggest

_FACTS_TIMEOUT_S = 60.0
# How the devices of this package are written; others stand behind them by their names.
_WRITTEN = {
    "local": "local[://?python=PATH]",
    "ssh": "ssh://[user@]host[:port]",
    "adb": "adb://[serial]",
    "fake": "fake[:readings.json]",
}
# What a shell says of a program that is not there, or that it may not start.
_NO_PROGRAM = (126, 127)
_PYTHON = "install it there (sudo apt install python3), or name another: --device 'ssh://HOST?python=/path/to/python3'"
# adb's shell may not enter the folders of apps, where Termux has its Python; and PyPI has no ONNX Runtime for Android.
_PHONE = (
    "name an onnxruntime_perf_test that was built for it as benchmark in the target's [setup]; or go by ssh to Termux "
    "on it: pkg install openssh python-onnxruntime, start sshd, --device ssh://PHONE:8022"
)
_ERRORS: Dict[str, Type[EdgepruneError]] = {
    e.__name__: e for e in (MissingDependency, ModelError, ParityError, UnsupportedModel, UsageError)
}


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

    @property
    def times_alone(self) -> str:
        """Why it neither answers images nor tells the times of layers, or "" where it does."""
        return _ort_perf_test.TIMES_ALONE if self.agent()[-1] == _ort_perf_test.AGENT else ""

    def facts(self) -> Dict[str, Any]:
        """What the machine says about itself; what it does not say is absent.

        machine, system, release, board, cpu, power_mode, governor: text. cores: count. memory_bytes.
        clock_hz, clock_max_hz: of the first core. temperature_c: of the hottest zone. load: of the last
        minute. flags: the CPU's features, sorted. memory_free_bytes, disk_free_bytes: of the working folder's disk.
        l4t: NVIDIA's release of a Jetson. emulated: True where a program plays the processor, so that times are
        not those of such a machine.
        """
        answer = self.run(["sh", "-c", FACTS], "", _FACTS_TIMEOUT_S)
        if answer.status != 0:
            raise _failed(self.name, ["sh", "-c", "(facts)"], answer)
        return host.parse(answer.stdout)

    def where(self) -> str:
        """The device and its kind of processor, as readings name the place: "local x86_64".

        A processor that is played by a program says so: "ssh://board aarch64 (emulated)".
        """
        said = self.facts()
        return f"{self.name} {said.get('machine', '')} {'(emulated)' if said.get('emulated') else ''}".strip()

    def check(self, argv: Sequence[str], timeout_s: float = 60.0) -> str:
        """Run a command that must succeed, and give what it printed."""
        answer = self.run(argv, "", timeout_s)
        if answer.status != 0:
            raise _failed(self.name, argv, answer)
        return answer.stdout

    @contextmanager
    def folder(self) -> Iterator[str]:
        """A new empty folder on the device, gone with all that is in it afterwards.

        On a machine with a shell it goes even if this process is killed or the connection is lost.
        """
        if isinstance(self, ShellDevice):
            with self.line.keep() as kept:
                yield kept
            return
        path = self.check(["mktemp", "-d", "-t", "edgeprune-XXXXXX"]).strip()
        try:
            yield path
        finally:
            self.run(["rm", "-rf", path], "", 60.0)

    @contextmanager
    def exclusively(
        self, *, wait_s: float = 0.0, log: Callable[[str], None] = lambda message: None
    ) -> Iterator[None]:
        """Be the only one who measures on the device; whoever is killed gives it free. Not to be nested."""
        if isinstance(self, ShellDevice):
            with self.line.alone(wait_s, log):
                yield
            return
        yield

    @contextmanager
    def holding(self, files: Mapping[str, Path]) -> Iterator[Dict[str, str]]:
        """Copies of files on the device, name -> path there, gone afterwards.

        Raises:
            UsageError: a file is not there.
        """
        with self.folder() as folder:
            there = {}
            for number, (name, here) in enumerate(files.items()):
                if not here.is_file():
                    raise UsageError(f"no file {str(here)!r}")
                there[name] = f"{folder}/{number}-{_plain(here.name)}"
                self.put(here, there[name])
            yield there

    def ask(
        self, request: Mapping[str, Any], *, timeout_s: float, env: Optional[Mapping[str, str]] = None
    ) -> Dict[str, Any]:
        """Send one request to the agent on the device, in a fresh process, and give its answer.

        Where this package is not installed, the agent travels with the request (`agent.START`).
        """
        prefix = ["env", *(f"{k}={v}" for k, v in env.items())] if env else []
        argv = [*prefix, *self.agent()]
        with_agent = agent.line() if argv[-1] == agent.START else ""
        answer = self.run(argv, with_agent + json.dumps(dict(request)), timeout_s)
        return self.told(argv, answer)

    def told(self, argv: Sequence[str], answer: Answer) -> Dict[str, Any]:
        """The object that the agent answered, started by that command."""
        travels, phone = argv[-1] == agent.START, self.name.startswith("adb:")
        if travels and answer.status in _NO_PROGRAM and not answer.stdout.strip():
            message = f"{self.name} has no {argv[-3]}: {_last(answer.stderr)}"
            raise MissingDependency(message, _PHONE if phone else _PYTHON)
        data, why = None, ""
        try:
            data = serialization.parse(answer.stdout)
        except ValueError as error:
            why = str(error)
        if isinstance(data, dict) and isinstance(data.get("error"), str):
            kind, hint = _ERRORS.get(str(data.get("kind")), DeviceError), str(data.get("hint", ""))
            if (
                data.get("kind") == NoRoom.__name__ and self.name == "local"
            ):  # another machine's room is its own
                kind = NoRoom
            if travels and hint.startswith("pip install "):
                hint = _PHONE if phone else f"on {self.name}: {argv[-3]} -m {hint}"
            # What runs there does not know how we call it.
            url = self.name if "://" in self.name else f"{self.name}://"
            hint = hint.replace("'URL?", f"'{url}?")
            raise kind(f"{data['error']} (on {self.name})", hint)
        if answer.status != 0 or not isinstance(data, dict):
            raise _failed(self.name, argv, answer, why)
        return data


class ShellDevice(Device):
    """A machine with a shell: it keeps a folder as long as we live, and lets only one of us measure."""

    @property
    @abstractmethod
    def line(self) -> Shell:
        """The way to its shell."""

    @property
    def talks(self) -> bool:
        """Whether its agent is a program that can stay open; of a single word, `run` plays the agent."""
        return len(self.agent()) > 1

    @contextmanager
    def talking(self, request: Mapping[str, Any]) -> Iterator[InteractiveCommand]:
        """The agent with a request that keeps it open; it ends with the context, or with this process."""
        argv = self.agent()
        with_agent = agent.line() if argv[-1] == agent.START else ""
        data = f"{with_agent}{json.dumps(dict(request))}\n".encode()
        with self.line.talk(argv, "(agent)") as talk:
            talk.send(data, START_S + len(data) / SLOWEST)
            yield talk


def device_from_url(url: str, setup: Optional[Mapping[str, Any]] = None) -> Device:
    """The device that a URL names: "local", "ssh://user@host:port", "adb://serial", "fake:readings.json".

    Args:
        setup: a target's [setup]; what is called like an option of the device (`benchmark` of adb) is handed on.

    Raises:
        UsageError: no such device in this version; says which there are.
    """
    scheme, _, address = url.partition(":")
    known = plugins.names("devices")
    if scheme not in known:
        accepted = ", ".join(_WRITTEN.get(name, name) for name in sorted(known, key=_order))
        raise UsageError(f"device {redacted(url)!r}: accepted are {accepted}", _hint(scheme, known))
    address = address[2:] if address.startswith("//") else address
    options = plugins.options("devices", scheme)
    default = options.get("address")
    if address and default is None:
        raise UsageError(f"device {redacted(url)!r}: {scheme} takes no address", f"write --device {scheme}")
    if not address and default not in (None, '""', "''"):
        raise UsageError(f"device {url!r} names no machine", f"write --device {_WRITTEN[scheme]}")
    given = {key: str(value) for key, value in (setup or {}).items() if key in options and key != "address"}
    device = plugins.build("devices", scheme, {**given, **({"address": address} if address else {})})
    assert isinstance(device, Device)
    return device


def redacted(url: str) -> str:
    """A URL for a message: what may be a password in it is left out."""
    scheme, colon, rest = url.partition(":")
    slashes = "//" if rest.startswith("//") else ""
    user, at, host = rest[len(slashes) :].rpartition("@")
    user = user.partition(":")[0] + ":***" if ":" in user else user
    return f"{scheme}{colon}{slashes}{user}{at}{host}"


def _plain(name: str) -> str:
    """A file's name as every system takes it; it only helps who looks into the folder."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", name)[-80:]


def _order(name: str) -> int:
    return list(_WRITTEN).index(name) if name in _WRITTEN else len(_WRITTEN)


def _last(stderr: str) -> str:
    return " | ".join(line.strip() for line in stderr.strip().splitlines()[-5:])


def _hint(scheme: str, known: Sequence[str]) -> str:
    close = suggest(scheme, known)
    return close if close.startswith("did you mean") else "measure on this machine with --device local"


def _failed(name: str, argv: Sequence[str], answer: Answer, why: str = "") -> EdgepruneError:
    how = (
        f"was killed by signal {-answer.status}"
        if answer.status < 0
        else f"ended with status {answer.status}"
    )
    if answer.status == 0:
        how = f"answered with something else than a JSON object: {answer.stdout.strip()[:200]!r}"
        how += f" ({why})" if why else ""
    if name == "local" and is_memory(answer.stderr):
        return NoRoom(f"out of memory: a command on {name} {how}: {_last(answer.stderr)}", LESS)
    command = " ".join("(agent)" if a == agent.START else shlex.quote(a) for a in argv)
    return DeviceError(
        f"a command on {name} {how}: {command}; its last words: {_last(answer.stderr) or 'none'}",
        "edgeprune doctor says what is missing",
    )
