"""The precisions and calibrations that were tried for the file that ships, one row each, and what became of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from edgeprune.records import Report
from edgeprune.stages.report_rows import quantity

TITLE = "Precision"
INTRODUCTION = (
    "Every file that was built, judged on calibration images (never on held-out ones). Layers that lost too much "
    "went back to float."
)
# Key of a candidate -> head of its column and unit.
COLUMNS = (
    ("clean_accuracy", "accuracy", "fraction"),
    ("robust_accuracy", "under attack", "fraction"),
    ("agreement", "agreement", "fraction"),
    ("sqnr_db", "SQNR", "dB"),
    ("size_bytes", "size", "B"),
    ("latency_s", "time", "s"),
)

_LARGEST = 1e300


def candidates(report: Report) -> tuple[list[str], list[list[str]]]:
    """The heads of the columns that have something in them, and the rows; both empty where nothing was tried.

    The first column names the candidate, the last says what became of it.
    """
    found = report.history.get("precision")
    tried = [row for row in found if isinstance(row, Mapping)] if isinstance(found, (list, tuple)) else []
    if not tried:
        return [], []
    used = [
        (key, head, unit)
        for key, head, unit in COLUMNS
        if any(_number(row.get(key)) is not None for row in tried)
    ]
    rows = [[_name(row), *(_text(row, key, unit) for key, _, unit in used), _end(row)] for row in tried]
    return ["candidate", *(head for _, head, _ in used), "outcome"], rows


def _name(row: Mapping[str, Any]) -> str:
    return str(row.get("name") or row.get("precision") or "-")


def _number(value: Any) -> float | None:
    """The value, where it is a number that a float holds."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or abs(value) > _LARGEST:
        return None
    return float(value) if math.isfinite(value) else None


def _text(row: Mapping[str, Any], key: str, unit: str) -> str:
    return quantity(_number(row.get(key)), unit)


def _end(row: Mapping[str, Any]) -> str:
    """What became of a candidate, and which of its layers are float."""
    layers = row.get("fallback")
    kept = [str(name) for name in layers] if isinstance(layers, (list, tuple)) else []
    words = "ships" if row.get("chosen") is True else str(row.get("why_not") or "-")
    return f"{words}; float: {', '.join(kept)}" if kept else words
