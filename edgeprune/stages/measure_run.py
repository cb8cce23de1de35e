"""measure: everything that is read off the dense and the compressed file of one run, side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edgeprune import bundled
from edgeprune.devices import Device
from edgeprune.recipe import MeasureTable
from edgeprune.records import Artifact, InputSpec, Plan, Reading, Target
from edgeprune.stages import measure, measure_answers, measure_layers, measure_speed

RESULT_VERSION = 2
# No more than this for the plots and for whoever reads report.json.
MOST_SAMPLES = 2000


@dataclass(frozen=True)
class Measured:
    """What the files said.

    samples: "dense"/"compressed" -> time of one image in s, in order. times: the same -> layer -> s.
    notes: what a reader must know of how it was had.
    """

    before: tuple[Reading, ...]
    after: tuple[Reading, ...]
    samples: Mapping[str, tuple[float, ...]]
    times: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Wanted:
    """What to read: where, how long, for which target, and on which images (`nn.data.Split` or None)."""

    spec: InputSpec
    device: Device
    table: MeasureTable
    target: Target
    images: Any
    say: Callable[[str], None]


def run(
    wanted: Wanted,
    files: Mapping[str, Path],
    plan: Plan | None,
    *,
    counted: Mapping[str, tuple[Reading, ...]] | None = None,
) -> Measured:
    """Measure "dense" and "compressed" (or one file alone).

    Args:
        files: name -> ONNX file. plan: the cut between them, for the counts and for the reason when it does not pay.
        counted: more that was counted of the networks behind the files, by the same names (`measure_densities`).

    Raises:
        DeviceError, MissingDependency, ModelError: the device or its runtime failed.
    """
    timed = measure.latency(files, wanted.device, wanted.table)
    nodes = {
        name: measure_layers.node_times(path, wanted.device, wanted.table, name=name)
        for name, path in files.items()
    }
    readings = {name: _file_readings(wanted, name, path, timed) for name, path in files.items()}
    if plan is not None:
        more = counted or {}
        readings = {
            name: (*_counted(plan, name), *more.get(name, ()), *_with_work(plan, name, rows))
            for name, rows in readings.items()
        }
    readings = _with_answers(wanted, files, readings)
    notes = list(_notes(wanted, timed))
    if plan is not None and timed.ratios:
        median = next(r.value for r in timed.readings["compressed"] if r.metric == "latency_p50")
        known = measure_speed.clues(
            plan, bundled.target("local"), "fp32", nodes=nodes["compressed"], latency_s=median or 0.0
        )
        notes.insert(0, f"Speed: {measure.speed_words(timed, known)}.")
    names = list(files)
    return Measured(
        before=readings[names[0]], after=readings[names[-1]],
        samples={n: _thinned(v) for n, v in timed.samples.items()},
        times={n: _by_layer(rows) for n, rows in nodes.items()}, notes=tuple(notes),
    )  # fmt: skip


def _by_layer(nodes: Any) -> dict[str, float]:
    seconds: dict[str, float] = {}
    for node in nodes:
        seconds[node.name] = seconds.get(node.name, 0.0) + node.seconds
    return seconds


def _thinned(samples: tuple[float, ...]) -> tuple[float, ...]:
    """Every k-th sample, so that an hour of timing does not make a report of a gigabyte."""
    return samples[:: -(-len(samples) // MOST_SAMPLES) or 1]


def _counted(plan: Plan, name: str) -> tuple[Reading, ...]:
    params, macs = (plan.params_before, plan.macs_before) if name == "dense" else (plan.params, plan.macs)
    return tuple(
        Reading(metric, float(value), "", 1, None, "counted", name, {})
        for metric, value in (("params", params), ("macs", macs))
    )


def _with_work(plan: Plan, name: str, rows: tuple[Reading, ...]) -> tuple[Reading, ...]:
    """Note at the times of a file that does exactly the dense file's work that a small gain is none."""
    if name == "dense" or plan.macs != plan.macs_before:
        return rows
    same = {"same_work": True}
    return tuple(
        replace(r, conditions={**r.conditions, **same}) if r.metric.startswith("latency") else r for r in rows
    )


def _file_readings(wanted: Wanted, name: str, path: Path, timed: measure.Latency) -> tuple[Reading, ...]:
    memory = measure.peak_memory(path, wanted.device, name=name)
    found = measure.speedup(timed)
    rows = []
    for reading in timed.readings[name]:
        extra: dict[str, Any] = {"contended": timed.contended}
        if found is not None and name == "compressed" and reading.metric == "latency_p50":
            clock, ratio = found
            pairs = {"value": ratio.value, "low": ratio.low, "high": ratio.high, "pairs": ratio.n}
            extra["speedup"] = {**pairs, "clock": clock}
        rows.append(replace(reading, conditions={**reading.conditions, **extra}))
    counted = (measure.size(path, name=name), measure.compressed_size(path, name=name))
    return (*counted, *rows, memory)


def _with_answers(
    wanted: Wanted, files: Mapping[str, Path], readings: Mapping[str, tuple[Reading, ...]]
) -> dict[str, tuple[Reading, ...]]:
    """Add the accuracy of each file, and how far they agree, where there are held-out images."""
    if wanted.images is None:
        return dict(readings)
    out, logits = {}, {}
    for name, path in files.items():
        wanted.say(f"measure: accuracy of {path.name} on {len(wanted.images)} held-out images")
        accuracy, logits[name] = measure_answers.accuracy(
            artifact(path, wanted.spec), wanted.images, wanted.device, name=name
        )
        out[name] = (*readings[name], accuracy)
    if {"dense", "compressed"} <= set(logits):
        same = measure_answers.agreement(logits["dense"], logits["compressed"])
        same = replace(same, artifact="compressed", where=wanted.device.where())
        out["compressed"] = (*out["compressed"], same)
    return out


def artifact(path: Path, spec: InputSpec) -> Artifact:
    """The record of an ONNX file."""
    return Artifact(str(path), "onnx", "fp32", spec, "", path.stat().st_size)


def _notes(wanted: Wanted, timed: measure.Latency) -> tuple[str, ...]:
    notes = []
    if wanted.target.name != "local":
        notes.append(
            f"Nothing has been measured on {wanted.target.title} yet: times and memory were taken on {timed.where}. "
            "Measure there before you rely on them."
        )
    if timed.contended:
        notes.append(
            "Other work ran on the machine while it was timed: wall times are too long; CPU times are to be believed."
        )
    if wanted.images is None:
        notes.append("No accuracy was measured: no held-out images were given (--data).")
    return tuple(notes)
