"""The precisions side by side: each file's bytes, its time on the device, its answers, and why it does not ship."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.nn.onnx_batch import batch_of
from edgeprune.quantities import show
from edgeprune.records import Reading
from edgeprune.stages.quantize_choice import Entry, Pick, seconds_of
from edgeprune.stages.quantize_floats import Floats, load
from edgeprune.stages.quantize_job import Built, Job, Judgement, row
from edgeprune.stages.quantize_judge import answers, frees
from edgeprune.stages.quantize_ship import Shipped

FLOAT = "fp32"
DENSE = "dense"


@dataclass(frozen=True, eq=False)
class Field:
    """What was built beside the float file. failed: precision -> why it can't ship. timed: name -> latency_p50."""

    exported: Path
    floats: Floats
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
    job.say(f"quantize: time {', '.join(files)} in turn")
    return job.timer(files)


def entries(field: Field) -> tuple[Entry, ...]:
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


def of_dense(field: Field, job: Job) -> dict[str, float | None]:
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


def rows(field: Field, picked: Pick) -> tuple[Mapping[str, Any], ...]:
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


def _filled(mine: dict[str, Any], field: Field, name: str, picked: Pick) -> dict[str, Any]:
    size = field.exported.stat().st_size if name == FLOAT else None
    if name in field.made:
        size = len(field.made[name].data)
    return {
        **mine, "size_bytes": size, "latency_s": field.seconds.get(name), "chosen": name == picked.precision,
        "why_not": picked.why_not.get(name, mine["why_not"]),
    }  # fmt: skip


def _facts(judgement: Judgement, size: int, field: Field, name: str) -> dict[str, float | None]:
    reading = field.timed.get(name)
    return {
        "size": float(size),
        "latency_p50": reading.value if reading else None,
        "clean_accuracy": judgement.clean_accuracy,
        "robust_accuracy": judgement.robust_accuracy,
    }
