"""This machine: commands are child processes, files are copied."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import List, Sequence

import edgeprune
from edgeprune.devices import Answer, Device
from edgeprune.errors import DeviceError

# Not `python -m`: that puts the current folder first on the path, where somebody's numpy.py would shadow numpy.
_START = (
    "import sys; sys.path[:] = [p for p in sys.path if p] + [sys.argv.pop(1)]; "
    "from edgeprune.agent import main; sys.exit(main())"
)


@dataclass(frozen=True)
class Local(Device):
    """The machine that edgeprune runs on."""

    @property
    def name(self) -> str:
        """As Device.name."""
        return "local"

    def run(self, argv: Sequence[str], stdin: str, timeout_s: float) -> Answer:
        """As Device.run."""
        command = " ".join(shlex.quote(a) for a in argv)
        try:
            done = subprocess.run(
                list(argv), input=stdin.encode(), capture_output=True, timeout=timeout_s, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise DeviceError(
                f"a command on local took longer than {timeout_s:g} s and was stopped: {command}; "
                f"its last words: {(error.stderr or b'').decode(errors='replace').strip()[-500:] or 'none'}",
                "time fewer iterations, as with --set measure.iterations=20",
            ) from error
        except OSError as error:
            raise DeviceError(f"a command on local can't be started: {command}: {error}") from error
        return Answer(
            done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
        )

    def put(self, here: Path, there: str) -> None:
        """As Device.put."""
        _copy(here, Path(there))

    def get(self, there: str, here: Path) -> None:
        """As Device.get."""
        _copy(Path(there), here)

    def agent(self) -> List[str]:
        """As Device.agent."""
        return [sys.executable, "-c", _START, str(Path(edgeprune.__file__).resolve().parent.parent)]


def _copy(source: Path, destination: Path) -> None:
    try:
        shutil.copyfile(source, destination)
    except OSError as error:
        raise DeviceError(
            f"{source} can't be copied to {destination}: {error}", "is there space left?"
        ) from error
