"""measure: all readings of the dense and the compressed file of a run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune import targets
from edgeprune.devices import Device
from edgeprune.measure import answers, counts, engines, latency, layer_times, place, resources, why_not_faster
from edgeprune.measure.engines import TENSORRT, Place, built_engines, choose, compare
from edgeprune.recipe import MeasureTable
from edgeprune.records import METRICS, Artifact, InputSpec, Plan, Reading, Target
from edgeprune.serialization import scratch_folder

# Other measurements end in minutes; a run that has trained for hours waits for them.
WAIT_S = 600.0
# No more than this for the plots and for whoever reads report.json.
MOST_SAMPLES = 2000
# Start of the note that the target itself is still to be measured.
NOT_THERE = "Nothing has been measured on"


@dataclass(frozen=True)
class Measured:
    """samples: "dense"/"compressed" -> time of one image in s, in order. times: the same -> layer -> s."""

    before: tuple[Reading, ...]
    after: tuple[Reading, ...]
    samples: Mapping[str, tuple[float, ...]]
    times: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class MeasureRequest:
    """What to measure. images: `data.collection.Split` or None.

    engines: folder for engines that are built on the device, or None. sparse: the file holds the 2:4 pattern.
    wait_s: how long to wait for the device to be free. judged: the file whose accuracy is measured and that engines
    are built from, where it is not the file that is timed.
    """

    spec: InputSpec
    device: Device
    table: MeasureTable
    target: Target
    images: Any
    log: Callable[[str], None]
    engines: Path | None = None
    sparse: bool = False
    wait_s: float = WAIT_S
    judged: Path | None = None


@dataclass(frozen=True)
class _Subject:
    """What is measured: name -> ONNX file, and what the device runs for it: the same, or the engine of it."""

    onnx: Mapping[str, Path]
    files: Mapping[str, Path]
    runtime: str
    notes: tuple[str, ...] = ()


def run(
    wanted: MeasureRequest,
    files: Mapping[str, Path],
    plan: Plan | None,
    *,
    counted: Mapping[str, tuple[Reading, ...]] | None = None,
) -> Measured:
    """Measure "dense" and "compressed" (or one file alone)."""
    with (
        wanted.device.exclusively(wait_s=wanted.wait_s, log=wanted.log),
        scratch_folder() as folder,
    ):
        return _run(wanted, _subject(wanted, files, wanted.engines or folder), plan, counted or {})


def _subject(wanted: MeasureRequest, files: Mapping[str, Path], folder: Path) -> _Subject:
    """What the device is to run: the files themselves, or engines built there and found right."""
    runtime, notes = choose(wanted.target, wanted.device)
    if runtime != TENSORRT:
        return _Subject(files, files, runtime, notes)
    wanted.log(f"measure: build engines on {wanted.device.where()}")
    place = Place(wanted.device, wanted.target, folder, wanted.sparse)
    engines = built_engines({name: wanted.judged or path for name, path in files.items()}, place)
    images = _few_images(wanted)
    said = [compare(e, wanted.spec, images, wanted.device) for e in engines.values()]
    words = tuple(engine.words for engine in engines.values())
    return _Subject(files, {n: e.path for n, e in engines.items()}, runtime, (*notes, *words, *said))


def _few_images(wanted: MeasureRequest) -> Any:
    """Held-out images float32 (N, C, H, W), or mixed pixels where there are none; the same at each call."""
    count = engines.IMAGES
    if wanted.images is not None and len(wanted.images):
        return np.asarray(next(iter(wanted.images.batches(count)))[0], dtype=np.float32)
    return np.random.default_rng(0).random((count, *wanted.spec.shape), dtype=np.float32)


def _run(
    wanted: MeasureRequest, subject: _Subject, plan: Plan | None, counted: Mapping[str, tuple[Reading, ...]]
) -> Measured:
    timed = latency.latency(subject.files, wanted.device, wanted.table, runtime=subject.runtime)
    nodes = {
        name: layer_times.node_times(
            path,
            wanted.device,
            wanted.table,
            name=name,
            runtime=subject.runtime,
            onnx_file=subject.onnx[name],
        )
        for name, path in subject.files.items()
    }
    readings = {name: _file_readings(wanted, name, subject, timed) for name in subject.files}
    if plan is not None:
        readings = {
            name: (*_counted(plan, name), *counted.get(name, ()), *_with_work(plan, name, subject, rows))
            for name, rows in readings.items()
        }
    readings = _with_answers(wanted, subject, readings)
    notes = [*_notes(wanted, timed, subject), *timed.notes, *subject.notes]
    if plan is not None and (timed.ratios or timed.emulated):
        median = next(r.value for r in timed.readings["compressed"] if r.metric == "latency_p50")
        machine = targets.target("local") if _elsewhere(wanted) else wanted.target
        known = why_not_faster.clues(
            plan, machine, engines.precision_of(subject.onnx["compressed"]),
            nodes=nodes["compressed"], latency_s=median or 0.0,
        )  # fmt: skip
        known = replace(known, nothing_removed=_nothing_removed(plan, subject))
        notes.insert(0, f"Speed: {latency.speed_words(timed, known)}.")
    names = list(subject.files)
    # Every k-th sample, so that an hour of timing does not make a report of a gigabyte.
    return Measured(
        before=readings[names[0]], after=readings[names[-1]],
        samples={n: v[:: -(-len(v) // MOST_SAMPLES) or 1] for n, v in timed.samples.items()},
        times={n: _by_layer(rows) for n, rows in nodes.items()}, notes=tuple(notes),
    )  # fmt: skip


def _elsewhere(wanted: MeasureRequest) -> bool:
    return wanted.device.name == "fake" or not place.on_target(wanted.target, wanted.device)


def _by_layer(nodes: Any) -> dict[str, float]:
    seconds: dict[str, float] = {}
    for node in nodes:
        seconds[node.name] = seconds.get(node.name, 0.0) + node.seconds
    return seconds


def _counted(plan: Plan, name: str) -> tuple[Reading, ...]:
    params, macs = (plan.params_before, plan.macs_before) if name == "dense" else (plan.params, plan.macs)
    return tuple(
        Reading(metric, float(value), "", 1, None, "counted", name, {})
        for metric, value in (("params", params), ("macs", macs))
    )


def _with_work(plan: Plan, name: str, subject: _Subject, rows: tuple[Reading, ...]) -> tuple[Reading, ...]:
    """Mark times of a file that does exactly the dense file's work: a small gain is then none."""
    if name == "dense" or plan.macs != plan.macs_before:
        return rows
    same = {"same_work": True, **({"nothing_removed": True} if _nothing_removed(plan, subject) else {})}
    return tuple(
        replace(r, conditions={**r.conditions, **same}) if r.metric.startswith("latency") else r for r in rows
    )


def _nothing_removed(plan: Plan, subject: _Subject) -> bool:
    counts = (plan.params, plan.macs) == (plan.params_before, plan.macs_before)
    return counts and len({engines.precision_of(path) for path in subject.onnx.values()}) == 1


def _file_readings(
    wanted: MeasureRequest, name: str, subject: _Subject, timed: latency.Latency
) -> tuple[Reading, ...]:
    path, onnx_file, device = subject.files[name], subject.onnx[name], wanted.device
    memory = resources.peak_memory(path, device, name=name, runtime=subject.runtime)
    found = latency.latency_ratio(timed)
    rows = []
    for reading in timed.readings[name]:
        extra: dict[str, Any] = {"contended": timed.contended}
        if found is not None and name == "compressed" and reading.metric == "latency_p50":
            clock, ratio = found
            pairs = {"value": ratio.value, "low": ratio.low, "high": ratio.high, "pairs": ratio.n}
            extra["speedup"] = {**pairs, "clock": clock}
        rows.append(replace(reading, conditions={**reading.conditions, **extra}))
    size = counts.size(onnx_file, name=name)
    if path != onnx_file:
        size = replace(size, conditions={**size.conditions, "engine_bytes": path.stat().st_size})
    # Absent is absent: a machine without power sensors has no reading of energy.
    seen = (
        (resources.energy(path, device, wanted.table, name=name, runtime=subject.runtime),)
        if timed.powered
        else ()
    )
    on_board = device.name == "local" and wanted.target.device != "local" and not _elsewhere(wanted)
    there = {"on_target": True} if on_board else {}
    taken = [replace(r, conditions={**r.conditions, **there}) for r in (*rows, memory, *seen)]
    return (size, counts.compressed_size(onnx_file, name=name), *taken)


def _with_answers(
    wanted: MeasureRequest, subject: _Subject, readings: Mapping[str, tuple[Reading, ...]]
) -> dict[str, tuple[Reading, ...]]:
    """Add the accuracy of each file and their agreement, or the reason why there is none."""
    if wanted.images is None:
        return dict(readings)
    if wanted.device.times_alone:
        return {name: (*rows, *_absent(wanted.device, subject, name)) for name, rows in readings.items()}
    out, logits = {}, {}
    for name, path in subject.files.items():
        wanted.log(f"measure: accuracy of {path.name} on {len(wanted.images)} held-out images")
        judged = path if path != subject.onnx[name] else wanted.judged or path
        accuracy, logits[name] = answers.accuracy(
            artifact(judged, wanted.spec), wanted.images, wanted.device, name=name, runtime=subject.runtime
        )
        out[name] = (*readings[name], accuracy)
    if {"dense", "compressed"} <= set(logits):
        same = answers.agreement(logits["dense"], logits["compressed"])
        same = replace(same, artifact="compressed", where=wanted.device.where())
        out["compressed"] = (*out["compressed"], same)
    return out


def _absent(device: Device, subject: _Subject, name: str) -> tuple[Reading, ...]:
    pair = name == "compressed" and "dense" in subject.files
    metrics = ("clean_accuracy", "agreement") if pair else ("clean_accuracy",)
    return tuple(answers.absent(m, METRICS[m].unit, device, name) for m in metrics)


def artifact(path: Path, spec: InputSpec) -> Artifact:
    """The record of an ONNX file."""
    return Artifact(str(path), "onnx", "fp32", spec, "", path.stat().st_size)


def _notes(wanted: MeasureRequest, timed: latency.Latency, subject: _Subject) -> tuple[str, ...]:
    notes = []
    if wanted.target.name != "local" and _elsewhere(wanted):
        notes.append(
            f"{NOT_THERE} {wanted.target.title} yet: times and memory were taken on {timed.where}. "
            "Measure there before you rely on them."
        )
    if timed.contended:
        notes.append(
            "Other work ran on the machine while it was timed: wall times are too long; CPU times are to be believed."
        )
    if wanted.images is None:
        notes.append("No accuracy was measured: no held-out images were given (--data).")
    return tuple(notes)
