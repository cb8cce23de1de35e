"""Energy on the device: what the board's own power sensors see while a model runs in a loop.

Where the board has none that can be read, energy is absent. Light: runs on the device.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Mapping

from edgeprune import agent_fields as fields
from edgeprune import agent_power as power
from edgeprune import agent_time, intervals
from edgeprune.runtimes import Runtime

# Loops that are integrated by themselves: their spread is the interval.
LOOPS = 10
# How much longer a loop may take on a machine that is too busy to read its sensor often, and with no reading at all.
PATIENCE_S, SILENT_S = 20.0, 1.0


def answer(request: Mapping[str, Any], runtime: Runtime, root: Path = power.ROOT) -> dict[str, Any]:
    """What the operation "energy" answers; `agent.handle` says what it asks and gets."""
    seconds, idle = fields.positive(request, "seconds"), fields.positive(request, "idle_seconds")
    path, threads, shape = (
        fields.text(request, "model"),
        fields.count(request, "threads"),
        fields.shape(request),
    )
    with power.metered(root) as meter:
        if meter is None:
            why = "this machine has no power sensor that can be read: no INA sensor in /sys, no tegrastats"
            return {"joule": None, "why": why, "runtime": runtime.version()}
        session = runtime.open(Path(path), threads)
        run = agent_time.ready(session, shape)
        for _ in range(LOOPS):
            run()
        with power.sampled(meter.watts) as resting:
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
        "joule": intervals.quantile(each, 0.5), "spread": intervals.quantile_interval(each, 0.5),
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


def _loop(run: Callable[[], Any], meter: power.Meter, seconds: float) -> _Loop:
    runs = 0
    with power.sampled(meter.watts) as samples:
        start = time.perf_counter()
        # Long enough, and for enough readings between start and end; but a sensor that gives none is not waited for.
        while time.perf_counter() - start < seconds or len(samples) < power.LEAST_SAMPLES + 2:
            run()
            runs += 1
            if time.perf_counter() - start > seconds + (PATIENCE_S if samples else SILENT_S):
                break
        end = time.perf_counter()
    return _Loop(runs, end - start, len(samples), power.integral(samples, start, end))
