"""Memory and energy of one file on a device."""

import statistics
from pathlib import Path
from typing import Any

from edgeprune.devices import Device
from edgeprune.measure.place import MOST, held, number_of, place
from edgeprune.recipe import MeasureTable
from edgeprune.records import METRICS, Reading

RUNTIME = "onnxruntime"
MEMORY_RUNS = 3
# glibc's own threshold moves while it runs, which alone makes peaks differ by 10 %; a fixed one repeats within 1 %.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "131072"}
# The sensors of a board average over tenths of a second, and its regulators settle.
ENERGY_S, IDLE_S = 5.0, 2.0
_START_S = 120.0
# What the agent says beside the peak, and what it is called in a reading.
_PARTS = {
    "at_load": "at_load_bytes", "baseline": "bare_runtime_bytes", "pss_added": "pss_bytes",
    "private_dirty_added": "private_dirty_bytes", "host": "host_bytes", "gpu": "gpu_bytes",
}  # fmt: skip


def peak_memory(path: Path, device: Device, *, name: str = "", runtime: str = RUNTIME) -> Reading:
    """The most memory that opening and running a model adds to a process that has started the bare runtime,
    CUDA's context included.

    The median of three fresh processes, each with one thread; `conditions` has their lowest and highest, what of it
    was proportional (PSS) and private, and on a GPU the GPU's share: added to the host's where the GPU has memory of
    its own, and the larger of the two where they share it, as on a Jetson.
    """
    there = place(device)
    with held(device, {"model": path}) as paths:
        request = {"op": "memory", "runtime": runtime, "model": paths["model"], "name": name, "threads": 1}
        answers = [device.ask(request, timeout_s=_START_S, env=MALLOC) for _ in range(MEMORY_RUNS)]
    conditions: dict[str, Any] = {
        "threads": 1, "runtime": answers[0].get("runtime"), "file_bytes": path.stat().st_size, **there.conditions,
    }  # fmt: skip
    peaks = sorted(number_of(a, "peak", device.name) for a in answers if a.get("peak") is not None)
    artifact, unit = name or path.name, METRICS["peak_memory"].unit
    if len(peaks) < MEMORY_RUNS:
        why = next((str(a["why"]) for a in answers if "why" in a), "the device did not say")
        return Reading("peak_memory", None, unit, 0, None, there.where, artifact, {**conditions, "why": why})
    conditions |= {
        label: statistics.median(
            number_of(a, key, device.name, -MOST if key.endswith("_added") else 0.0) for a in answers
        )
        for key, label in _PARTS.items()
        if all(key in a for a in answers)
    }
    if "shared" in answers[0]:
        conditions["shared_with_gpu"] = answers[0]["shared"] is True
    conditions |= {"lowest": peaks[0], "highest": peaks[-1]}
    peak = statistics.median(peaks)
    return Reading("peak_memory", peak, unit, len(peaks), None, there.where, artifact, conditions)


def energy(
    path: Path, device: Device, table: MeasureTable, *, name: str = "", runtime: str = RUNTIME
) -> Reading:
    """Joules that the board takes for one image while the model runs in a loop, everything on the board included.

    `conditions` has the power meanwhile and at rest. None, with the reason, where the device has no power sensor.
    """
    there = place(device)
    seconds = min(ENERGY_S, table.seconds)
    request = {
        "op": "energy", "runtime": runtime, "name": name, "threads": table.threads, "seconds": seconds,
        "idle_seconds": min(IDLE_S, table.seconds),
    }  # fmt: skip
    with held(device, {"model": path}) as paths:
        answer = device.ask({**request, "model": paths["model"]}, timeout_s=_START_S + 10.0 * table.seconds)
    known = ("runtime", "source", "rails", "watts", "idle_watts", "images", "seconds", "samples")
    conditions: dict[str, Any] = {
        "threads": table.threads, **there.conditions, **{key: answer[key] for key in known if key in answer},
    }  # fmt: skip
    artifact, unit = name or path.name, METRICS["energy"].unit
    if not answer.get("joule"):  # a sensor that reads no power reads nothing
        why = str(answer.get("why") or "the device did not say")
        return Reading("energy", None, unit, 0, None, there.where, artifact, {**conditions, "why": why})
    joule = number_of(answer, "joule", device.name)
    spread, interval = answer.get("spread"), None
    if spread is not None:
        ends = spread if isinstance(spread, list) and len(spread) == 2 else [spread, spread]
        low, high = (number_of({"spread": end}, "spread", device.name) for end in ends)
        interval = (low, high)
    count = int(number_of(answer, "images", device.name, 1))
    return Reading("energy", joule, unit, count, interval, there.where, artifact, conditions)
