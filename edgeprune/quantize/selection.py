"""Which precision ships, by each file's budget, time on the device and accuracy, and why the others do not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.onnx_graph import batch_of
from edgeprune.quantities import show
from edgeprune.quantize.evaluation import FloatBaseline, can_free_batch, load, logits_of
from edgeprune.quantize.finalize import Shipped
from edgeprune.quantize.job import Built, Job, row
from edgeprune.records import METRICS, Limit, Reading

FLOAT, DENSE = "fp32", "dense"
# Two timings of one file differ by up to this much; less is no gain.
NOISE = 0.02
# Above this other work ran on the machine, and CPU times are more reliable.
CONTENDED = 1.05
ACCURACIES = ("clean_accuracy", "robust_accuracy")


@dataclass(frozen=True, eq=False)
class Candidate:
    """The float file, or one precision beside it; with `why_not` it can't ship.

    facts: metric -> value, for the limits of the budget. seconds: of one image.
    """

    precision: str
    facts: Mapping[str, float | None] = field(default_factory=dict)
    seconds: float | None = None
    why_not: str = ""
    built: Built | None = None
    file: Shipped | None = None


@dataclass(frozen=True)
class Selection:
    """The precision that ships, and of every other one why it does not."""

    precision: str
    why_not: Mapping[str, str]


def pick(
    candidates: Sequence[Candidate],
    limits: Mapping[str, Limit],
    dense: Mapping[str, float | None],
    place: str,
) -> Selection:
    """Choose among the float file, which is the first candidate, and others.

    Those that miss fewer limits of the budget come first, then the fastest; another file must be faster than the float
    file by more than timings scatter. Limits of accuracy that the float file misses itself are ignored.

    Args:
        dense: metric -> value of the unpruned file, for relative limits.
        place: where the times were taken.
    """
    first = candidates[0]
    ignored = set(ACCURACIES) & set(missed_limits(limits, first.facts, dense))
    relevant = {metric: limit for metric, limit in limits.items() if metric not in ignored}
    able = [c for c in candidates if not c.why_not]
    missed = {c.precision: missed_limits(relevant, c.facts, dense) for c in able}

    def rank(candidate: Candidate) -> tuple[int, float]:
        misses = len(missed[candidate.precision])
        if candidate.seconds is None or first.seconds is None:
            return misses, float(candidate is not first)
        return misses, candidate.seconds * (1.0 if candidate is first else 1.0 + NOISE)

    chosen = min(able, key=rank)

    def why_not(other: Candidate) -> str:
        worse = [m for m in missed[other.precision] if m not in missed[chosen.precision]]
        if worse:
            return f"misses the budget of {', '.join(worse)}, which {chosen.precision} meets"
        if other.seconds is None or chosen.seconds is None or first.seconds is None:
            return "nothing says that it is faster: no time was taken"
        times = f"{show(other.seconds, 's')}, {chosen.precision} {show(chosen.seconds, 's')} on {place}"
        slower = "slower" if other.seconds > chosen.seconds else "not faster by more than timings scatter"
        return f"{slower}: {times}"

    return Selection(
        chosen.precision, {c.precision: c.why_not or why_not(c) for c in candidates if c is not chosen}
    )


def missed_limits(
    limits: Mapping[str, Limit], facts: Mapping[str, float | None], dense: Mapping[str, float | None]
) -> tuple[str, ...]:
    """The limits that a file misses, of those whose metric is known for it."""
    missed: list[str] = []
    for metric, limit in limits.items():
        value, reference = facts.get(metric), dense.get(metric)
        if value is None or (reference is None and limit.kind != "absolute"):
            continue
        threshold = limit.threshold(reference or 0.0)
        if value > threshold if METRICS[metric].less_is_better else value < threshold:
            missed.append(metric)
    return tuple(missed)


def timed(exported: Path, candidates: Sequence[Candidate], job: Job) -> Mapping[str, Reading]:
    """Time the files alternately on the target's device; empty without that device or without a second file."""
    made = {c.precision: c.file.data for c in candidates if c.file is not None}
    if job.timer is None or not made:
        return {}
    files = {FLOAT: exported}
    job.scratch.mkdir(parents=True, exist_ok=True)
    for precision, data in made.items():
        files[precision] = job.scratch / f"{precision}.onnx"
        files[precision].write_bytes(data)
    if job.dense is not None and "latency_p50" in job.limits and job.limits["latency_p50"].kind != "absolute":
        files[DENSE] = job.dense
    job.log(f"quantize: time {', '.join(files)} in turn")
    return job.timer(files)


def seconds_of(times: Mapping[str, Reading]) -> dict[str, float]:
    """The time of one image of each file: by the wall clock, or the thread's CPU time when other work ran."""
    cpu = {name: r.conditions.get("cpu_p50") for name, r in times.items()}
    busy = any((r.conditions.get("contention") or 1.0) > CONTENDED for r in times.values())
    found = {name: cpu[name] if busy and all(cpu.values()) else r.value for name, r in times.items()}
    return {name: float(value) for name, value in found.items() if value is not None}


def place_of(times: Mapping[str, Reading]) -> str:
    """Where, and with how many threads, the times were taken."""
    reading = next(iter(times.values()), None)
    if reading is None:
        return "no device"
    threads = reading.conditions.get("threads", 1)
    return f"{reading.where}, {threads} thread{'s' if threads != 1 else ''}"


def with_facts(
    candidates: Sequence[Candidate], exported: Path, floats: FloatBaseline, times: Mapping[str, Reading]
) -> list[Candidate]:
    """The float file and the candidates, each with its size, times and accuracies."""
    seconds, found = seconds_of(times), list[Candidate]()
    for candidate in (Candidate(FLOAT), *candidates):
        if candidate.why_not:
            found.append(candidate)
            continue
        name = candidate.precision
        size = len(candidate.file.data) if candidate.file else exported.stat().st_size
        judgement = candidate.built.judgement if candidate.built else floats.evaluation.own
        facts = {
            "size": float(size),
            "latency_p50": times[name].value if name in times else None,
            "clean_accuracy": judgement.clean_accuracy,
            "robust_accuracy": judgement.robust_accuracy,
        }
        found.append(replace(candidate, facts=facts, seconds=seconds.get(name)))
    return found


def dense_facts(job: Job, floats: FloatBaseline, times: Mapping[str, Reading]) -> dict[str, float | None]:
    """The unpruned file's bytes, time, and accuracy on the judged images, where relative limits refer to it."""
    if job.dense is None or not any(limit.kind != "absolute" for limit in job.limits.values()):
        return {}
    facts: dict[str, float | None] = {"size": float(job.dense.stat().st_size)}
    facts["latency_p50"] = times[DENSE].value if DENSE in times else None
    evaluation = floats.evaluation
    if evaluation.labels is not None and "clean_accuracy" in job.limits:
        model, images = load(job.dense)[1], evaluation.images[: evaluation.clean]
        free = batch_of(model) is not None and can_free_batch(model, images)
        right = logits_of(model, images, free=free).argmax(1) == evaluation.labels[: evaluation.clean]
        facts["clean_accuracy"] = float(np.mean(right))
    return facts


def rows(
    candidates: Sequence[Candidate], floats: FloatBaseline, selection: Selection
) -> tuple[Mapping[str, Any], ...]:
    """Every candidate in `Quantized.candidates`: the float file, each precision, what was tried for it."""
    found: list[Mapping[str, Any]] = []
    for c in candidates:
        name, built = c.precision, c.built
        why_not = selection.why_not.get(name, "")
        if built is None:
            judgement = floats.evaluation.own if name == FLOAT else None
            mine = row(name, name, judgement, why_not=why_not, options={})
        else:
            mine = row(
                name, built.name, built.judgement, why_not=why_not, options=built.options,
                fallback=tuple(built.fallback),
            )  # fmt: skip
        size = c.facts.get("size")
        measured = {"size_bytes": None if size is None else int(size), "latency_s": c.seconds}
        found.append({**mine, **measured, "chosen": name == selection.precision})
        found += built.tried if built else ()
    return tuple(found)
