"""An Android phone behind the system's adb; without Python there, by ONNX Runtime's own benchmark program."""

from __future__ import annotations

import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import List, Sequence, Tuple

from edgeprune import agent
from edgeprune.devices import _ort_perf_test
from edgeprune.devices._base import ShellDevice
from edgeprune.devices.transport.shell import SLOWEST, Shell, size_in
from edgeprune.devices.transport.stream import START_S, Answer
from edgeprune.errors import DeviceError, UsageError

# As adb devices lists them: serial numbers, HOST:PORT, adb-XXX._adb-tls-connect._tcp, emulator-5554.
_SERIAL = re.compile(r"[A-Za-z0-9\[][A-Za-z0-9._:\[\]%-]*")
# What adb says -> what is wrong, and what to do. The first that fits.
_FAULTS = (
    (
        "no devices/emulators found",
        "no phone is connected",
        "plug it in with USB debugging on, and look: adb devices",
    ),
    ("unauthorized", "it has not allowed this computer", "unlock it and allow USB debugging on its screen"),
    (
        "still authorizing",
        "it has not allowed this computer",
        "unlock it and allow USB debugging on its screen",
    ),
    ("more than one", "several are connected", "name one of adb devices: --device adb://SERIAL"),
    ("offline", "it is offline", "plug it in again, or: adb reconnect offline"),
    (
        "not found",
        "it is not connected",
        "look for its serial number: adb devices; by network: adb connect HOST:PORT",
    ),
    (
        "doesn't support PTY",
        "its Android is older than 7",
        "take a newer phone: status and outputs need Android 7",
    ),
    ("No such file or directory: 'adb'", "there is no adb on this machine", "sudo apt install adb"),
)


@dataclass(frozen=True)
class Adb(ShellDevice):
    """A phone. address: its serial number, "" for the only one that is connected.

    benchmark: path on this machine of an onnxruntime_perf_test that was built for the phone, or of a folder with it
    and its libraries; "" for a phone with python3 and onnxruntime.
    """

    address: str = ""
    benchmark: str = ""

    def __post_init__(self) -> None:
        if self.address and not _SERIAL.fullmatch(self.address):
            raise UsageError(
                f"device {'adb://' + self.address!r} is not a serial number; accepted: adb://[serial]",
                "adb devices lists them",
            )
        if self.benchmark and not self._programs():
            raise UsageError(
                f"there is no {_ort_perf_test.PROGRAM} at {self.benchmark!r}",
                "benchmark in the target's [setup] is its path, or that of a folder with it",
            )

    @property
    def name(self) -> str:
        """As Device.name."""
        return f"adb://{self.address}"

    @property
    def line(self) -> Shell:
        """See `ShellDevice.line`."""
        return Shell(self.name, self._attached, _explained)

    def run(self, argv: Sequence[str], stdin: str, timeout_s: float) -> Answer:
        """As Device.run; what asks for the agent is answered by the benchmark program, where one is named."""
        if argv[-1] == _ort_perf_test.AGENT:
            return self._measured(stdin, timeout_s)
        return self.line.run(argv, stdin.encode(), timeout_s)

    def put(self, here: Path, there: str) -> None:
        """As Device.put."""
        part, size = f"{there}.part", here.stat().st_size if here.is_file() else 0
        try:
            self._adb(["push", str(here.absolute()), part], size)
            self.check(["mv", "-f", part, there])
        except DeviceError:
            self.run(["rm", "-f", part], "", START_S)
            raise

    def get(self, there: str, here: Path) -> None:
        """As Device.get."""
        said = self.check(["sh", "-c", 'wc -c <"$1"', "sh", there])
        size = size_in(said)
        if size is None:
            raise DeviceError(f"{there} on {self.name} has no size, but {said.strip()[:80]!r}")
        part = here.absolute().with_name(here.name + ".part")
        try:
            self._adb(["pull", there, str(part)], size)
            found = part.stat().st_size
            if found != size:
                raise DeviceError(f"of {there} on {self.name}, {size} bytes, {found} bytes arrived")
            part.replace(here)
        except OSError as error:
            raise DeviceError(f"{there} on {self.name} can't be copied to {here}: {error}") from error
        finally:
            part.unlink(missing_ok=True)

    def agent(self) -> List[str]:
        """As Device.agent."""
        return [_ort_perf_test.AGENT] if self.benchmark else ["python3", "-c", agent.START]

    def _attached(self, argv: Sequence[str]) -> List[str]:
        # adb hands one string to the phone's shell; every word is quoted for it. -T: bytes as they are.
        return [*self._prefix(), "shell", "-T", "exec " + " ".join(shlex.quote(word) for word in argv)]

    def _prefix(self) -> List[str]:
        return ["adb", *(["-s", self.address] if self.address else [])]

    def _adb(self, argv: Sequence[str], size: int) -> None:
        shown = " ".join(shlex.quote(word) for word in argv)
        limit_s = START_S + size / SLOWEST
        try:
            done = subprocess.run(
                [*self._prefix(), *argv],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=limit_s,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise DeviceError(f"{self.name}: adb {shown} took longer than {limit_s:.0f} s") from error
        except OSError as error:
            what, fix = _explained(str(error))
            raise DeviceError(f"{self.name} can't be reached: {what}", fix) from error
        if done.returncode != 0:
            said = (done.stderr + done.stdout).decode(errors="replace")
            what, fix = _explained(said)
            full = "No space left" in said
            hint = "free some space on the phone: adb shell df -h /data/local/tmp" if full else fix
            raise DeviceError(f"{self.name}: adb {shown} failed: {what}", hint)

    def _programs(self) -> List[Path]:
        """The benchmark program, and the libraries that lie beside it; none when it is not there."""
        path = Path(self.benchmark)
        if path.is_dir():
            files = sorted(
                p
                for p in path.iterdir()
                if p.is_file() and (p.suffix == ".so" or p.name == _ort_perf_test.PROGRAM)
            )
            return files if any(p.name == _ort_perf_test.PROGRAM for p in files) else []
        return [path] if path.is_file() else []

    def _measured(self, request: str, timeout_s: float) -> Answer:
        with self.line.keep() as folder:
            for file in self._programs():
                name = _ort_perf_test.PROGRAM if file.suffix != ".so" else file.name
                self.put(file, f"{folder}/{name}")
            self.check(["chmod", "755", f"{folder}/{_ort_perf_test.PROGRAM}"])
            return _ort_perf_test.respond(
                request, folder, lambda argv, limit_s: self.line.run(argv, b"", min(limit_s, timeout_s))
            )


def _explained(said: str) -> Tuple[str, str]:
    last = " | ".join(line.strip() for line in said.strip().splitlines()[-3:])
    for sign, what, fix in _FAULTS:
        if sign in said:
            return f"{what} ({last})", fix
    return last or "the connection ended without a word", "look at it: adb devices -l"
