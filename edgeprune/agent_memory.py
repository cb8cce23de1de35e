"""Memory on the device: the most that a model adds to a process that has started the bare runtime.

Light: runs on the device.
"""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any, Mapping

from edgeprune import agent_cuda, agent_time
from edgeprune import agent_fields as fields
from edgeprune.runtimes import Runtime

PROCESS = Path("/proc/self")
_RUNS = 3
# Of smaps_rollup: what belongs to this process (shared pages by their share), and what only it has and has written.
_PARTS = {"pss": "Pss", "private_dirty": "Private_Dirty"}


def answer(request: Mapping[str, Any], runtime: Runtime, process: Path = PROCESS) -> dict[str, Any]:
    """What the operation "memory" answers; `agent.handle` says what it asks and gets."""
    version = runtime.version()
    # Asking the GPU makes CUDA's context: a hundred MB or more that any model takes, so it comes before all readings.
    gpu = _Gpu(agent_cuda.load()) if runtime.on_gpu else None
    before = status("VmRSS", process)
    if before is None:
        return {"peak": None, "why": "this system has no /proc/self/status", "runtime": version}
    # VmHWM starts again from here; where that is not allowed, the check below notices if it matters.
    with suppress(OSError):
        (process / "clear_refs").write_text("5")
    old_peak, old_parts = status("VmHWM", process) or 0, parts(process)
    session = runtime.open(Path(fields.text(request, "model")), fields.count(request, "threads"))
    loaded = status("VmHWM", process) or 0
    run = agent_time.ready(session, fields.shape(request))
    for _ in range(_RUNS):
        run()
        if gpu:
            gpu.look()
    peak, now = status("VmHWM", process) or 0, parts(process)
    if peak <= old_peak and old_peak > before:
        why = "the start of the runtime took more memory than the model, and /proc/self/clear_refs can't be written"
        return {"peak": None, "why": why, "runtime": version}
    added = {f"{key}_added": now[key] - old_parts[key] for key in now if key in old_parts}
    # The kernel counts pages in lots: a model that takes less than one can seem to give some back.
    found = {"peak": max(0, peak - before), "at_load": max(0, loaded - before), "baseline": before, **added}
    return {**found, **(gpu.added(found["peak"]) if gpu else {}), "runtime": version}


class _Gpu:
    """Memory of the GPU in use: before the model came, and the most seen since."""

    def __init__(self, cuda: agent_cuda.Cuda) -> None:
        self.cuda = cuda
        self.before = self.most = cuda.in_use()

    def look(self) -> None:
        self.most = max(self.most, self.cuda.in_use())

    def added(self, host: int) -> dict[str, Any]:
        """With the GPU's memory; a GPU that shares the machine's counts the same pages as the process."""
        more = max(0, self.most - self.before)
        shared = self.cuda.integrated()
        return {
            "peak": max(host, more) if shared else host + more,
            "host": host,
            "gpu": more,
            "shared": shared,
        }


def parts(process: Path = PROCESS) -> dict[str, int]:
    """Bytes of "pss" and "private_dirty" of the process; what the kernel does not say is absent."""
    try:
        text = (process / "smaps_rollup").read_text(encoding="ascii", errors="replace")
    except OSError:
        return {}
    found = {key: re.search(rf"^{name}:\s*(\d+) kB", text, re.MULTILINE) for key, name in _PARTS.items()}
    return {key: int(match.group(1)) * 1024 for key, match in found.items() if match}


def status(key: str, process: Path = PROCESS) -> int | None:
    """A line of /proc/self/status in bytes, or None where there is none."""
    try:
        text = (process / "status").read_text()
    except OSError:
        return None
    match = re.search(rf"^{key}:\s*(\d+) kB", text, re.MULTILINE)
    return int(match.group(1)) * 1024 if match else None
