"""Signs that an accuracy was measured on the wrong images, or on images that were prepared in another way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from edgeprune import codec
from edgeprune.errors import WorkdirError
from edgeprune.nn.data import Split
from edgeprune.records import Reading, Report

REPORT = "report.json"


def guessing(reading: Reading, split: Split) -> Reading:
    """A clean_accuracy, with a flag where it is no better than naming one class for all images."""
    classes = len(split.labels.unique())
    low = reading.spread[0] if reading.spread else 0.0
    if classes < 2 or low > 1 / classes:
        return reading
    return _flagged(
        reading,
        f"{reading.artifact} is right on {_percent(reading)} of {reading.n} images, no better than guessing: look at "
        "the normalization (--mean, --std) and at the order of the classes.",
    )


def reported(reading: Reading, run: Path) -> Reading:
    """A clean_accuracy of a run's file, with a flag where it is far below what the run's own report says.

    Far below: the 95 % intervals do not meet. Nothing is said where there is no report, or none with an accuracy.
    """
    try:
        report = codec.read(Report, run / REPORT, WorkdirError)
    except WorkdirError:
        return reading
    told = next((r for r in report.after if r.metric == reading.metric and r.value is not None), None)
    if told is None or reading.value is None or reading.spread is None:
        return reading
    low = told.spread[0] if told.spread else told.value
    if low is None or reading.spread[1] >= low:
        return reading
    return _flagged(
        reading,
        f"{reading.artifact} is right on {_percent(reading)} of these {reading.n} images, and {REPORT} says "
        f"{_percent(told)} of {told.n}: these are other images, or prepared in another way, or their classes are in "
        "another order.",
    )


def _percent(reading: Reading) -> str:
    return f"{100 * (reading.value or 0.0):.1f} %"


def _flagged(reading: Reading, flag: str) -> Reading:
    flags = [*reading.conditions.get("flags", ()), flag]
    return replace(reading, conditions={**reading.conditions, "flags": flags})
