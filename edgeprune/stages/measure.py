"""Measure what ships: time, memory, size and accuracy of the files themselves, in child processes on a device.

Only the agent (edgeprune/agent.py) touches the runtime; here its raw samples become readings.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeprune import intervals
from edgeprune.devices import Device
from edgeprune.errors import DeviceError
from edgeprune.recipe import MeasureTable
from edgeprune.records import METRICS, Reading
from edgeprune.stages.measure_answers import accuracy, agreement, predict
from edgeprune.stages.measure_layers import node_times, per_layer
from edgeprune.stages.measure_size import compressed_size, size
from edgeprune.stages.measure_speed import Clues, Ratio, clues, words

__all__ = [
    "Clues", "Latency", "Ratio", "accuracy", "agreement", "clues", "compressed_size", "latency", "node_times",
    "peak_memory", "per_layer", "predict", "size", "speed_words", "speedup", "where",
]  # fmt: skip

RESULT_VERSION = 1
RUNTIME = "onnxruntime"
QUANTILES = (("latency_p50", 0.5), ("latency_p90", 0.9), ("latency_p99", 0.99))
# Above these, other work on the machine got in the way: wall over CPU time of the median run, and the share of the
# time of all runs in which the thread was not running (which the higher percentiles show).
CONTENDED = 1.05
WAITED = 0.1
# Fewer blocks than this give no useful interval of their median, so single runs are paired instead.
LEAST_BLOCKS = 12
MEMORY_RUNS = 3
# glibc's own threshold moves while it runs, which alone makes peaks differ by 10 %; a fixed one repeats within 1 %.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "131072"}
_START_S = 120.0


@dataclass(frozen=True)
class Latency:
    """Timings that were taken together, alternately, in one process.

    readings: model -> latency_p50, latency_p90, latency_p99. samples: model -> wall time of one image in s, in order.
    ratios: "wall", and with one thread "cpu": dense over compressed, empty unless both were timed.
    contended: other work ran on the machine, so the wall times are too long and the CPU times are to be believed.
    """

    where: str
    threads: int
    readings: Mapping[str, tuple[Reading, ...]]
    samples: Mapping[str, tuple[float, ...]]
    ratios: Mapping[str, Ratio] = field(default_factory=dict)
    contended: bool = False


@dataclass(frozen=True)
class _Timed:
    """One model's samples in s for one image: wall, and thread CPU time (empty with more than one thread)."""

    wall: Sequence[float]
    cpu: Sequence[float]
    batch: int

    @property
    def contention(self) -> float | None:
        return statistics.median(self.wall) / statistics.median(self.cpu) if self.cpu else None

    @property
    def waited(self) -> float | None:
        return max(0.0, 1.0 - sum(self.cpu) / sum(self.wall)) if self.cpu else None

    @property
    def contended(self) -> bool:
        return (self.contention or 1.0) > CONTENDED or (self.waited or 0.0) > WAITED


def latency(models: Mapping[str, Path], device: Device, table: MeasureTable) -> Latency:
    """Time models on one image, alternately, so that noise hits all of them.

    Args:
        models: name -> ONNX file; "dense" and "compressed" are compared with each other.

    Raises:
        UsageError: a file is not there.
        DeviceError: the process on the device crashed, took too long or answered nonsense.
        MissingDependency: the device has no ONNX Runtime.
        ModelError: ONNX Runtime refuses a file.
    """
    with device.holding(models) as paths:
        answer = device.ask(
            {
                "op": "time", "runtime": RUNTIME, "models": paths, "threads": table.threads, "warmup": table.warmup,
                "iterations": table.iterations, "seconds": table.seconds,
            },
            timeout_s=_START_S + 10.0 * table.seconds * len(models),
        )  # fmt: skip
    timed = {name: _timed(answer, name, device.name) for name in models}
    place = device.where()
    conditions = {
        "threads": table.threads, "warmup": answer.get("warmup"), "clock": "wall", "load": answer.get("load"),
        "runtime": answer.get("runtime"), "priority": answer.get("priority"),
    }  # fmt: skip
    return Latency(
        where=place,
        threads=table.threads,
        readings={name: _latency_readings(name, t, place, conditions) for name, t in timed.items()},
        samples={name: tuple(t.wall) for name, t in timed.items()},
        ratios=_ratios(timed, int(answer.get("block", 1))),
        contended=any(t.contended for t in timed.values()),
    )


def peak_memory(path: Path, device: Device, *, name: str = "") -> Reading:
    """The most memory that opening and running a model adds to a process that has loaded the bare runtime.

    The median of three fresh processes, each with one thread; `conditions` has their lowest and highest.

    Raises:
        UsageError, DeviceError, MissingDependency, ModelError: as for `latency`.
    """
    with device.holding({"model": path}) as paths:
        request = {"op": "memory", "runtime": RUNTIME, "model": paths["model"], "name": name, "threads": 1}
        answers = [device.ask(request, timeout_s=_START_S, env=MALLOC) for _ in range(MEMORY_RUNS)]
    conditions: dict[str, Any] = {
        "threads": 1,
        "runtime": answers[0].get("runtime"),
        "file_bytes": path.stat().st_size,
    }
    peaks = sorted(_number(a, "peak", device.name) for a in answers if a.get("peak") is not None)
    if len(peaks) < MEMORY_RUNS:
        why = next((str(a["why"]) for a in answers if "why" in a), "the device did not say")
        return _reading(
            "peak_memory", None, 0, None, device.where(), name or path.name, {**conditions, "why": why}
        )
    at_load = statistics.median(_number(a, "at_load", device.name) for a in answers)
    runtime = statistics.median(_number(a, "baseline", device.name) for a in answers)
    conditions |= {
        "at_load_bytes": at_load,
        "bare_runtime_bytes": runtime,
        "lowest": peaks[0],
        "highest": peaks[-1],
    }
    peak = statistics.median(peaks)
    return _reading("peak_memory", peak, len(peaks), None, device.where(), name or path.name, conditions)


def where(device: Device) -> str:
    """The place as readings name it: "local x86_64"."""
    return device.where()


def speedup(timings: Latency) -> tuple[str, Ratio] | None:
    """How many times faster the compressed model is, and by which clock: "wall", or "cpu" on a busy machine."""
    kind = "cpu" if timings.contended and "cpu" in timings.ratios else "wall"
    return (kind, timings.ratios[kind]) if kind in timings.ratios else None


def speed_words(timings: Latency, known: Clues | None = None) -> str:
    """One sentence without a full stop: how many times faster the compressed model is, or that it is not and why."""
    found = speedup(timings)
    if found is None:
        return f"the speed can't be compared: timed were only {', '.join(timings.samples) or 'no models'}"
    place = f"{timings.where}, {timings.threads} thread{'s' if timings.threads > 1 else ''}"
    if found[0] == "cpu":
        place += ", by CPU time because other work ran on the machine"
    return words(found[1], place, known)


def _reading(  # noqa: PLR0913, PLR0917 - the fields of a Reading, in their order
    metric: str,
    value: float | None,
    n: int,
    spread: tuple[float, float] | None,
    place: str,
    artifact: str,
    conditions: Mapping[str, Any],
) -> Reading:
    return Reading(metric, value, METRICS[metric].unit, n, spread, place, artifact, conditions)


def _latency_readings(name: str, timed: _Timed, place: str, shared: Mapping[str, Any]) -> tuple[Reading, ...]:
    ordered, n = sorted(timed.wall), len(timed.wall)
    conditions: dict[str, Any] = {**shared, "iterations": n, "batch": timed.batch}
    conditions["cv"] = statistics.pstdev(ordered) / statistics.fmean(ordered)
    if timed.cpu:
        conditions |= {
            "cpu_p50": statistics.median(timed.cpu),
            "contention": timed.contention,
            "waited": timed.waited,
        }
    readings = []
    for metric, q in QUANTILES:
        spread = intervals.quantile_interval(ordered, q)
        extra = (
            {} if spread else {"no_interval": f"{n} runs are too few for a 95 % interval of this quantile"}
        )
        value = intervals.quantile(ordered, q)
        readings.append(_reading(metric, value, n, spread, place, name, {**conditions, **extra}))
    return tuple(readings)


def _ratios(timed: Mapping[str, _Timed], block: int) -> dict[str, Ratio]:
    if not {"dense", "compressed"} <= set(timed):
        return {}
    dense, compressed = timed["dense"], timed["compressed"]
    ratios = {"wall": _ratio(dense.wall, compressed.wall, block)}
    if dense.cpu and compressed.cpu:
        ratios["cpu"] = _ratio(dense.cpu, compressed.cpu, block)
    return ratios


def _ratio(dense: Sequence[float], compressed: Sequence[float], block: int) -> Ratio:
    """Median of paired ratios. Pairs are blocks that ran next to each other: runs within one share their noise."""
    n = min(len(dense), len(compressed))
    step = block if block > 0 and n // block >= LEAST_BLOCKS else 1
    starts = range(0, n - step + 1, step)
    pairs = [
        (statistics.median(dense[i : i + step]), statistics.median(compressed[i : i + step])) for i in starts
    ]
    ordered = sorted(d / c for d, c in pairs)
    low, high = intervals.quantile_interval(ordered, 0.5) or (ordered[0], ordered[-1])
    return Ratio(intervals.quantile(ordered, 0.5), low, high, len(ordered))


def _timed(answer: Mapping[str, Any], name: str, device: str) -> _Timed:
    models = answer.get("models")
    row = models.get(name) if isinstance(models, dict) else None
    if not isinstance(row, dict):
        raise DeviceError(f"the agent on {device} answered no times for {name!r}: {answer!r:.200}")
    batch = row.get("batch", 1)
    wall, cpu = (row.get(key, []) for key in ("wall_ns", "cpu_ns"))
    good = (
        isinstance(batch, int)
        and batch >= 1
        and isinstance(wall, list)
        and isinstance(cpu, list)
        and len(wall) > 0
    )
    if not good or len(cpu) not in (0, len(wall)) or not all(_is_time(v) for v in (*wall, *cpu)):
        raise DeviceError(f"the agent on {device} answered times for {name!r} that are none: {row!r:.200}")
    return _Timed([v * 1e-9 / batch for v in wall], [v * 1e-9 / batch for v in cpu], batch)


def _is_time(value: Any) -> bool:
    return (
        isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0
    )


def _number(answer: Mapping[str, Any], key: str, device: str) -> float:
    value = answer.get(key)
    if (
        not isinstance(value, (int, float))
        or isinstance(value, bool)
        or not math.isfinite(value)
        or value < 0
    ):
        raise DeviceError(f"the agent on {device} answered {key} = {value!r}; expected a number of bytes")
    return float(value)
