"""This machine: commands are child processes, files are copied."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import List, Sequence, Tuple

import edgeprune
from edgeprune import agent
from edgeprune.devices._base import ShellDevice
from edgeprune.devices.transport import stream
from edgeprune.devices.transport.shell import Shell
from edgeprune.devices.transport.stream import Answer
from edgeprune.errors import DeviceError, UsageError

# Not `python -m`: that puts the current folder first on the path, where somebody's numpy.py would shadow numpy.
_START = (
    "import sys; sys.path[:] = [p for p in sys.path if p] + [sys.argv.pop(1)]; "
    "from edgeprune.agent.program import main; sys.exit(main())"
)


@dataclass(frozen=True)
class Local(ShellDevice):
    """The machine that edgeprune runs on.

    address: "" or "?python=PATH", the Python whose runtime is used: on a Jetson TensorRT belongs to the system's.
    """

    address: str = ""

    def __post_init__(self) -> None:
        if self.address and not self._python:
            raise UsageError(f"device 'local:{self.address}' is none", "write local or local://?python=PATH")

    @property
    def _python(self) -> str:
        word, _, python = self.address.partition("=")
        return python if word == "?python" else ""

    @property
    def name(self) -> str:
        """As Device.name."""
        return "local"

    @property
    def line(self) -> Shell:
        """See `ShellDevice.line`."""
        return Shell(self.name, list, _explain)

    def run(self, argv: Sequence[str], stdin: str, timeout_s: float) -> Answer:
        """As Device.run."""
        command = " ".join(shlex.quote(a) for a in argv)
        try:
            process = subprocess.Popen(
                list(argv), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise DeviceError(f"a command on local can't be started: {command}: {error}") from error
        with process:
            try:
                out, errors = process.communicate(stdin.encode(), timeout=timeout_s)
            except subprocess.TimeoutExpired as error:
                raise DeviceError(
                    f"a command on local took longer than {timeout_s:g} s and was stopped: {command}; "
                    f"its last words: {(error.stderr or b'').decode(errors='replace').strip()[-500:] or 'none'}",
                    "time fewer iterations, as with --set measure.iterations=20",
                ) from error
            finally:
                stream.stop(process)  # and what it started, after Ctrl-C too
        return Answer(process.returncode, out.decode(errors="replace"), errors.decode(errors="replace"))

    def put(self, here: Path, there: str) -> None:
        """As Device.put."""
        _copy(here, Path(there))

    def get(self, there: str, here: Path) -> None:
        """As Device.get."""
        _copy(Path(there), here)

    def agent(self) -> List[str]:
        """As Device.agent."""
        if self._python:
            return [self._python, "-c", agent.START]
        return [sys.executable, "-c", _START, str(Path(edgeprune.__file__).resolve().parent.parent)]


def _explain(said: str) -> Tuple[str, str]:
    return said.strip() or "it said nothing", ""


def _copy(source: Path, destination: Path) -> None:
    try:
        shutil.copyfile(source, destination)
    except OSError as error:
        raise DeviceError(
            f"{source} can't be copied to {destination}: {error}", "is there space left?"
        ) from error
