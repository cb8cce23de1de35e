"""Memory on the device: the most that a model adds to a process that has started the bare runtime."""

from __future__ import annotations

import re
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Mapping

from edgeprune import confidence, host, runtimes
from edgeprune.agent import protocol, timing
from edgeprune.runtimes import Runtime

# Loops that are integrated by themselves: their spread is the interval.
LOOPS = 10
# How much longer a loop may take on a machine that is too busy to read its sensor often, and with no reading at all.
PATIENCE_S, SILENT_S = 20.0, 1.0


def energy_reply(request: Mapping[str, Any], runtime: Runtime, root: Path = host.ROOT) -> dict[str, Any]:
    """What the operation "energy" answers; `agent.handle` says what it asks and gets."""
    seconds, idle = protocol.positive(request, "seconds"), protocol.positive(request, "idle_seconds")
    path, threads, shape = (
        protocol.text(request, "model"),
        protocol.count(request, "threads"),
        protocol.shape(request),
    )
    with host.metered(root) as meter:
        if meter is None:
            why = "this machine has no power sensor that can be read: no INA sensor in /sys, no tegrastats"
            return {"joule": None, "why": why, "runtime": runtime.version()}
        session = runtime.open(Path(path), threads)
        run = timing.ready(session, shape)
        for _ in range(LOOPS):
            run()
        with host.sampled(meter.watts) as resting:
            time.sleep(idle)
        loops: list[_Loop] = []
        # A sensor that gives nothing once is not waited for nine times more.
        while len(loops) < LOOPS and all(loop.joules is not None for loop in loops):
            loops.append(_loop(run, meter, seconds / LOOPS))
    batch, about = session.input_shape[0] or 1, {"source": meter.source, "rails": list(meter.rails)}
    each = sorted(loop.joules / (loop.runs * batch) for loop in loops if loop.joules is not None)
    watts = [w for _, w in resting]
    if len(each) < LOOPS or not watts:
        why = f"{meter.source} gave too few readings of {', '.join(meter.rails)}"
        return {"joule": None, "why": why, "runtime": runtime.version(), **about}
    return {
        "joule": confidence.quantile(each, 0.5), "spread": confidence.quantile_interval(each, 0.5),
        "watts": sum(loop.joules or 0.0 for loop in loops) / sum(loop.seconds for loop in loops),
        "idle_watts": sum(watts) / len(watts), "images": batch * sum(loop.runs for loop in loops),
        "seconds": sum(loop.seconds for loop in loops), "samples": sum(loop.samples for loop in loops),
        "runtime": runtime.version(), **about,
    }  # fmt: skip


@dataclass(frozen=True)
class _Loop:
    runs: int
    seconds: float
    samples: int
    joules: float | None


def _loop(run: Callable[[], Any], meter: host.Meter, seconds: float) -> _Loop:
    runs = 0
    with host.sampled(meter.watts) as samples:
        start = time.perf_counter()
        # Long enough, and for enough readings between start and end; but a sensor that gives none is not waited for.
        while time.perf_counter() - start < seconds or len(samples) < host.LEAST_SAMPLES + 2:
            run()
            runs += 1
            if time.perf_counter() - start > seconds + (PATIENCE_S if samples else SILENT_S):
                break
        end = time.perf_counter()
    return _Loop(runs, end - start, len(samples), host.integral(samples, start, end))


PROCESS = Path("/proc/self")
_RUNS = 3
# Of smaps_rollup: what belongs to this process (shared pages by their share), and what only it has and has written.
_PARTS = {"pss": "Pss", "private_dirty": "Private_Dirty"}


def memory_reply(request: Mapping[str, Any], runtime: Runtime, process: Path = PROCESS) -> dict[str, Any]:
    """What the operation "memory" answers; `agent.handle` says what it asks and gets."""
    version = runtime.version()
    # Asking the GPU makes CUDA's context: a hundred MB or more that any model takes, so it comes before all readings.
    gpu = _Gpu(runtimes.load()) if runtime.on_gpu else None
    before = status("VmRSS", process)
    if before is None:
        return {"peak": None, "why": "this system has no /proc/self/status", "runtime": version}
    # VmHWM starts again from here; where that is not allowed, the check below notices if it matters.
    with suppress(OSError):
        (process / "clear_refs").write_text("5")
    old_peak, old_parts = status("VmHWM", process) or 0, parts(process)
    session = runtime.open(Path(protocol.text(request, "model")), protocol.count(request, "threads"))
    loaded = status("VmHWM", process) or 0
    run = timing.ready(session, protocol.shape(request))
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

    def __init__(self, cuda: runtimes.Cuda) -> None:
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
