"""Measure what ships: time, memory, size and accuracy of the files themselves, in child processes on a device."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx

from edgeprune import confidence
from edgeprune.devices import Device
from edgeprune.errors import DeviceError, ModelError
from edgeprune.measure.place import EMULATED, Place, held, number_of, place
from edgeprune.measure.why_not_faster import Clues, words
from edgeprune.onnx_graph import ONNX_ERRORS, batch_of
from edgeprune.recipe import MeasureTable
from edgeprune.records import METRICS, Reading
from edgeprune.speedup import WIDE, Ratio

RESULT_VERSION = 2
RUNTIME = "onnxruntime"
QUANTILES = (("latency_p50", 0.5), ("latency_p90", 0.9), ("latency_p99", 0.99))
# Above these, other work on the machine got in the way: wall over CPU time of the median run, and the share of the
# time of all runs in which the thread was not running (which the higher percentiles show).
CONTENDED = 1.05
WAITED = 0.1
# Fewer blocks than this give no useful interval of their median, so single runs are paired instead.
LEAST_BLOCKS = 12
# Timing ends when both ends of the 95 % interval of each median are within this share of the median, or at a cap.
PRECISION = 0.02
# But not before there are enough runs for an interval of the 99th percentile, unless they are slow.
ENOUGH = 368
# Above this coefficient of variation the runs of one file differ more than they should (trtexec warns from 1 % on).
UNSTEADY = 0.025
# More images in one run, or a longer run, than there is on any machine.
MOST_IMAGES, LONGEST_NS = 10**6, 1e14
_START_S = 120.0


@dataclass(frozen=True)
class Latency:
    """Timings taken alternately in one process.

    readings: model -> latency_p50, latency_p90, latency_p99. samples: model -> wall time of one image in s, in order.
    ratios: "wall", and with one thread "cpu": dense over compressed, empty unless both were timed.
    contended: other work made the wall times too long. inconclusive: why the two can't be distinguished, or "".
    emulated: the times mean nothing, so there is no ratio. powered: the device measures its power.
    """

    where: str
    threads: int
    readings: Mapping[str, tuple[Reading, ...]]
    samples: Mapping[str, tuple[float, ...]]
    ratios: Mapping[str, Ratio] = field(default_factory=dict)
    contended: bool = False
    inconclusive: str = ""
    emulated: bool = False
    powered: bool = False
    notes: tuple[str, ...] = ()


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


def latency(
    models: Mapping[str, Path], device: Device, table: MeasureTable, *, runtime: str = RUNTIME
) -> Latency:
    """Time models on one image, alternately, so that noise hits all of them.

    It ends when the medians are known within `PRECISION`, or at `table.iterations` runs or `table.seconds` of each.
    "dense" and "compressed" are compared.
    """
    there = place(device)
    with held(device, models) as paths:
        answer = device.ask(
            {
                "op": "time", "runtime": runtime, "models": paths, "threads": table.threads, "warmup": table.warmup,
                "iterations": table.iterations, "seconds": table.seconds, "precision": PRECISION,
                "least": min(ENOUGH, max(table.iterations, 10)),
            },
            timeout_s=_START_S + 10.0 * table.seconds * len(models),
        )  # fmt: skip
    timed = {name: _timed(answer, name, device.name, path) for name, path in models.items()}
    block = int(number_of(answer, "block", device.name)) if "block" in answer else 1
    conditions = {
        "threads": table.threads, "warmup": answer.get("warmup"), "clock": answer.get("clock") or "wall",
        "load": answer.get("load"), "runtime": answer.get("runtime"), "priority": answer.get("priority"),
        **{key: answer[key] for key in ("before", "after", "stopped") if answer.get(key)}, **there.conditions,
    }  # fmt: skip
    readings = {name: _latency_readings(name, t, there.where, conditions) for name, t in timed.items()}
    ratios = {} if there.emulated else _ratios(timed, block)
    contended = any(t.contended for t in timed.values())
    return Latency(
        where=there.where,
        threads=table.threads,
        readings=readings,
        samples={name: tuple(t.wall) for name, t in timed.items()},
        ratios=ratios,
        contended=contended,
        inconclusive=_undecided(_believed(ratios, contended), contended),
        emulated=there.emulated,
        powered=answer.get("powered") is True,
        notes=_notes(readings, there),
    )


def where(device: Device) -> str:
    """The place as readings name it: "local x86_64"."""
    return place(device).where


def latency_ratio(timings: Latency) -> tuple[str, Ratio] | None:
    """How many times faster the compressed model is, and by which clock: "wall", or "cpu" on a busy machine."""
    return _believed(timings.ratios, timings.contended)


def speed_words(timings: Latency, known: Clues | None = None) -> str:
    """One sentence without a full stop: how many times faster the compressed model is, or that it is not and why."""
    found = latency_ratio(timings)
    if timings.emulated:
        return f"the speed can't be compared on {timings.where}: {EMULATED}"
    if found is None:
        return f"the speed can't be compared: timed were only {', '.join(timings.samples) or 'no models'}"
    where_and_how = f"{timings.where}, {timings.threads} thread{'s' if timings.threads > 1 else ''}"
    if found[0] == "cpu":
        where_and_how += ", by CPU time because other work ran on the machine"
    return words(found[1], where_and_how, known, unsure=bool(timings.inconclusive))


def _believed(ratios: Mapping[str, Ratio], contended: bool) -> tuple[str, Ratio] | None:
    kind = "cpu" if contended and "cpu" in ratios else "wall"
    return (kind, ratios[kind]) if kind in ratios else None


def _undecided(found: tuple[str, Ratio] | None, contended: bool) -> str:
    """Why dense and compressed can't be told apart: the interval of their ratio has 1 in it, and there was noise."""
    if found is None or not found[1].low <= 1.0 <= found[1].high:
        return ""
    if contended:
        return "other work ran on the machine, and the interval of the ratio has 1 in it"
    if found[1].high / found[1].low > WIDE:
        return "the timings differ more than the models"
    return ""


def _notes(readings: Mapping[str, Sequence[Reading]], there: Place) -> tuple[str, ...]:
    """What a reader must know: an emulated processor, a median that is not known well, runs that differ."""
    notes = [f"{there.where}: {EMULATED}."] if there.emulated else []
    medians = {name: rows[0].conditions for name, rows in readings.items()}
    vague = [f"{name}: {about['inconclusive']}" for name, about in medians.items() if "inconclusive" in about]
    if vague:
        notes.append(f"The median time is inconclusive. {'; '.join(vague)}.")
    shaky = [
        f"{100 * about['cv']:.1f} % ({name})" for name, about in medians.items() if about["cv"] > UNSTEADY
    ]
    if shaky:
        notes.append(
            f"Times are unsteady: the runs of one file differ by {', '.join(shaky)}, as a coefficient of variation; "
            f"above {100 * UNSTEADY:.1f} % fixed clocks and an idle machine give better ones."
        )
    return tuple(notes)


def _latency_readings(name: str, timed: _Timed, where: str, shared: Mapping[str, Any]) -> tuple[Reading, ...]:
    ordered, n = sorted(timed.wall), len(timed.wall)
    conditions: dict[str, Any] = {**shared, "iterations": n, "batch": timed.batch}
    conditions["cv"] = statistics.pstdev(ordered) / statistics.fmean(ordered)
    conditions |= _precision(ordered, str(shared.get("stopped") or "the caps"))
    if timed.cpu:
        conditions |= {
            "cpu_p50": statistics.median(timed.cpu),
            "contention": timed.contention,
            "waited": timed.waited,
        }
    readings = []
    for metric, q in QUANTILES:
        spread = confidence.quantile_interval(ordered, q)
        extra = (
            {} if spread else {"no_interval": f"{n} runs are too few for a 95 % interval of this quantile"}
        )
        value = confidence.quantile(ordered, q)
        about = {**conditions, **extra}
        readings.append(Reading(metric, value, METRICS[metric].unit, n, spread, where, name, about))
    return tuple(readings)


def _precision(ordered: Sequence[float], stopped: str) -> dict[str, Any]:
    found, median = confidence.quantile_interval(ordered, 0.5), confidence.quantile(ordered, 0.5)
    if found is None:
        return {"inconclusive": f"{len(ordered)} runs are too few for an interval of the median"}
    share = max(found[1] - median, median - found[0]) / median
    if share <= PRECISION:
        return {"precision": share}
    why = f"after {len(ordered)} runs ({stopped}) it is known within {100 * share:.1f} %, not {100 * PRECISION:.0f} %"
    return {"precision": share, "inconclusive": why}


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
    low, high = confidence.quantile_interval(ordered, 0.5) or (ordered[0], ordered[-1])
    return Ratio(confidence.quantile(ordered, 0.5), low, high, len(ordered))


def _timed(answer: Mapping[str, Any], name: str, device: str, path: Path) -> _Timed:
    models = answer.get("models")
    row = models.get(name) if isinstance(models, dict) else None
    if not isinstance(row, dict):
        raise DeviceError(f"the agent on {device} answered no times for {name!r}: {answer!r:.200}")
    batch = row["batch"] if "batch" in row else _batch(path)
    wall, cpu = (row.get(key, []) for key in ("wall_ns", "cpu_ns"))
    good = (
        type(batch) is int
        and 1 <= batch <= MOST_IMAGES
        and isinstance(wall, list)
        and isinstance(cpu, list)
        and len(wall) > 0
    )
    if not good or len(cpu) not in (0, len(wall)) or not all(_is_time(v) for v in (*wall, *cpu)):
        raise DeviceError(f"the agent on {device} answered times for {name!r} that are none: {row!r:.200}")
    return _Timed([v * 1e-9 / batch for v in wall], [v * 1e-9 / batch for v in cpu], batch)


def _batch(path: Path) -> int:
    """How many images one run of a file takes, where the device does not tell: as its input says, 1 if it is free."""
    try:
        return batch_of(onnx.load(path, load_external_data=False)) or 1
    except ONNX_ERRORS as error:
        raise ModelError(f"{path} is not a readable ONNX file: {error}") from error


def _is_time(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 1 <= value <= LONGEST_NS
