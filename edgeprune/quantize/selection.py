"""The precisions side by side: each file's bytes, its time on the device, its answers, and why it does not ship."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.onnx_graph import batch_of
from edgeprune.quantities import show
from edgeprune.quantize.evaluation import FloatBaseline, answers, frees, load
from edgeprune.quantize.finalize import Shipped
from edgeprune.quantize.job import Built, Job, Judgement, row
from edgeprune.records import METRICS, Limit, Reading

# Two timings of one file differ by up to this much; less is no gain.
NOISE = 0.02
# Above this other work ran on the machine, and CPU times are to be believed.
CONTENDED = 1.05
ACCURACIES = ("clean_accuracy", "robust_accuracy")


@dataclass(frozen=True)
class Entry:
    """One precision that could ship. facts: metric -> value, for the limits. seconds: of one image, or None."""

    precision: str
    facts: Mapping[str, float | None]
    seconds: float | None = None
    why_not: str = ""


@dataclass(frozen=True)
class Selection:
    """The precision that ships, and of every other one why it does not."""

    precision: str
    why_not: Mapping[str, str]
    notes: tuple[str, ...] = field(default_factory=tuple)


def seconds_of(timed: Mapping[str, Reading]) -> dict[str, float]:
    """The time of one image of each file: by the wall clock, or the thread's CPU time when other work ran."""
    cpu = {name: r.conditions.get("cpu_p50") for name, r in timed.items()}
    busy = any((r.conditions.get("contention") or 1.0) > CONTENDED for r in timed.values())
    found = {name: cpu[name] if busy and all(cpu.values()) else r.value for name, r in timed.items()}
    return {name: float(value) for name, value in found.items() if value is not None}


def pick(
    entries: tuple[Entry, ...], limits: Mapping[str, Limit], dense: Mapping[str, float | None], place: str
) -> Selection:
    """Choose among the float file, which is the first entry, and others.

    Those that miss fewer limits of the budget come first, then the fastest; another file must be faster than the float
    file by more than timings scatter. Limits of accuracy that the float file misses itself say nothing here.

    Args:
        limits: the run's budget. dense: metric -> value of the unpruned file, for relative limits. place: where the
            times were taken.
    """
    first = entries[0]
    telling = {
        metric: limit
        for metric, limit in limits.items()
        if metric not in ACCURACIES or not _misses(limit, first.facts.get(metric), dense.get(metric))
    }
    able = [e for e in entries if not e.why_not]
    missed = {e.precision: missed_limits(telling, e.facts, dense) for e in able}

    def rank(entry: Entry) -> tuple[int, float]:
        if entry.seconds is None or first.seconds is None:
            return len(missed[entry.precision]), float(entry is not first)
        return len(missed[entry.precision]), entry.seconds * (1.0 if entry is first else 1.0 + NOISE)

    chosen = min(able, key=rank)
    why_not = {
        e.precision: e.why_not or _why_not(e, chosen, first, missed, place)
        for e in entries
        if e is not chosen
    }
    return Selection(chosen.precision, why_not)


def missed_limits(
    limits: Mapping[str, Limit], facts: Mapping[str, float | None], dense: Mapping[str, float | None]
) -> tuple[str, ...]:
    """The limits that a file misses, of those whose metric is known of it."""
    return tuple(m for m, limit in limits.items() if _misses(limit, facts.get(m), dense.get(m)))


def _misses(limit: Limit, value: float | None, dense: float | None) -> bool:
    if value is None or (dense is None and limit.kind != "absolute"):
        return False
    known = dense or 0.0
    threshold = {"absolute": limit.value, "share": limit.value * known, "delta": known + limit.value}[
        limit.kind
    ]
    return value > threshold if METRICS[limit.metric].less_is_better else value < threshold


def _why_not(
    entry: Entry, chosen: Entry, first: Entry, missed: Mapping[str, tuple[str, ...]], place: str
) -> str:
    worse = [m for m in missed[entry.precision] if m not in missed[chosen.precision]]
    if worse:
        return f"misses the budget of {', '.join(worse)}, which {chosen.precision} meets"
    if entry.seconds is None or chosen.seconds is None or first.seconds is None:
        return "nothing says that it is faster: no time was taken"
    times = f"{show(entry.seconds, 's')}, {chosen.precision} {show(chosen.seconds, 's')} on {place}"
    if entry.seconds > chosen.seconds:
        return f"slower: {times}"
    return f"not faster by more than timings scatter: {times}"


FLOAT = "fp32"
DENSE = "dense"


@dataclass(frozen=True, eq=False)
class Candidate:
    """What was built beside the float file. failed: precision -> why it can't ship. timed: name -> latency_p50."""

    exported: Path
    floats: FloatBaseline
    built: Mapping[str, Built]
    made: Mapping[str, Shipped]
    failed: Mapping[str, str]
    timed: Mapping[str, Reading]

    @property
    def seconds(self) -> dict[str, float]:
        """File -> the time of one image."""
        return seconds_of(self.timed)

    @property
    def place(self) -> str:
        """Where, and with how many threads, the times were taken."""
        reading = next(iter(self.timed.values()), None)
        if reading is None:
            return "no device"
        threads = reading.conditions.get("threads", 1)
        return f"{reading.where}, {threads} thread{'s' if threads != 1 else ''}"

    def against_float(self, precision: str) -> str:
        """Two times in words."""
        seconds = self.seconds
        return (
            f"{show(seconds.get(precision), 's')} against {show(seconds.get(FLOAT), 's')} on {self.place}"
            if {precision, FLOAT} <= set(seconds)
            else "not timed"
        )


def timed(exported: Path, made: Mapping[str, Shipped], job: Job) -> Mapping[str, Reading]:
    """Time the files alternately on the target's device; empty where it is not there or there is but one file."""
    if job.timer is None or not made:
        return {}
    files = {FLOAT: exported}
    job.scratch.mkdir(parents=True, exist_ok=True)
    for precision, ships in made.items():
        files[precision] = job.scratch / f"{precision}.onnx"
        files[precision].write_bytes(ships.data)
    if job.dense is not None and "latency_p50" in job.limits and job.limits["latency_p50"].kind != "absolute":
        files[DENSE] = job.dense
    job.log(f"quantize: time {', '.join(files)} in turn")
    return job.timer(files)


def entries(field: Candidate) -> tuple[Entry, ...]:
    """The float file first, then what failed, then what could ship."""
    start, seconds = field.floats, field.seconds
    own = start.panel.judge(start.panel.logits)
    size = field.exported.stat().st_size
    first = Entry(FLOAT, _facts(own, size, field, FLOAT), seconds.get(FLOAT))
    failed = (Entry(name, {}, None, why) for name, why in field.failed.items())
    able = (
        Entry(name, _facts(field.built[name].judgement, len(m.data), field, name), seconds.get(name))
        for name, m in field.made.items()
    )
    return (first, *failed, *able)


def of_dense(field: Candidate, job: Job) -> dict[str, float | None]:
    """What relative limits of the budget speak of: the unpruned file's bytes, time, accuracy on the judged images."""
    if job.dense is None or not any(limit.kind != "absolute" for limit in job.limits.values()):
        return {}
    facts: dict[str, float | None] = {"size": float(job.dense.stat().st_size)}
    reading = field.timed.get(DENSE)
    facts["latency_p50"] = reading.value if reading else None
    panel = field.floats.panel
    if panel.labels is not None and "clean_accuracy" in job.limits:
        model, pixels = load(job.dense)[1], panel.pixels[: panel.clean]
        free = batch_of(model) is not None and frees(model, pixels)
        right = answers(model, pixels, free=free).argmax(1) == panel.labels[: panel.clean]
        facts["clean_accuracy"] = float(np.mean(right))
    return facts


def rows(field: Candidate, picked: Selection) -> tuple[Mapping[str, Any], ...]:
    """Every candidate as `Quantized.candidates` lists it: the float file, each precision, what was tried for it."""
    start = field.floats
    own = start.panel.judge(start.panel.logits)
    found = [_filled(row(FLOAT, FLOAT, own, why_not="", options={}), field, FLOAT, picked)]
    for name, why in field.failed.items():
        if name not in field.built:
            found.append(row(name, name, None, why_not=why, options={}))
    for name, built in field.built.items():
        mine = row(
            name, built.name, built.judgement, why_not=field.failed.get(name, ""), options=built.options,
            fallback=tuple(built.fallback),
        )  # fmt: skip
        found += [_filled(mine, field, name, picked), *built.tried]
    return tuple(found)


def _filled(mine: dict[str, Any], field: Candidate, name: str, picked: Selection) -> dict[str, Any]:
    size = field.exported.stat().st_size if name == FLOAT else None
    if name in field.made:
        size = len(field.made[name].data)
    return {
        **mine, "size_bytes": size, "latency_s": field.seconds.get(name), "chosen": name == picked.precision,
        "why_not": picked.why_not.get(name, mine["why_not"]),
    }  # fmt: skip


def _facts(judgement: Judgement, size: int, field: Candidate, name: str) -> dict[str, float | None]:
    reading = field.timed.get(name)
    return {
        "size": float(size),
        "latency_p50": reading.value if reading else None,
        "clean_accuracy": judgement.clean_accuracy,
        "robust_accuracy": judgement.robust_accuracy,
    }
