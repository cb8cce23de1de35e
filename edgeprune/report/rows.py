"""What a report says, worked out once: the rows that the terminal, Markdown and HTML forms all show."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgeprune import speedup
from edgeprune.quantities import show
from edgeprune.records import METRICS, Reading, Report, is_place
from edgeprune.report import per_device

SPEED = ("latency_p50", "latency_p90", "latency_p99")
# What is read without labels is no accuracy and stands in a section of its own.
UNLABELLED = ("synthetic_agreement", "synthetic_kl")

# Measured without an interval: a change smaller than this share is neither better nor worse.
WOBBLY = ("peak_memory", "energy")
SAME_SHARE = 0.01
# Up to here every whole number is a float of its own.
EXACT = 2.0**53
_LARGEST = 1e300
LAYER_COLUMNS = (
    ("channels", "channels_before", "channels_after", ""),
    ("params", "params_before", "params_after", ""),
    ("macs", "macs_before", "macs_after", ""),
    ("size", "size_before", "size_after", "B"),
    ("time", "time_before_s", "time_after_s", "s"),
)
# Only where single weights were pruned: elsewhere the parameters say it.
NONZERO = ("non-zero weights", "nonzero_before", "nonzero_after", "")


@dataclass(frozen=True)
class Row:
    """One metric of the before/after table as text. better: True, False, or None when it can't be said."""

    metric: str
    about: str
    dense: str
    compressed: str
    change: str
    how: str
    better: bool | None
    before: Reading | None
    after: Reading | None


@dataclass(frozen=True)
class LedgerRow:
    """One accuracy after one stage; value, low and high are in the unit, the last two None without an interval."""

    metric: str
    stage: str
    unit: str
    value: float | None
    low: float | None
    high: float | None
    n: int
    text: str
    how: str


def comparison(report: Report) -> list[Row]:
    """The before/after table: one row per metric that either side has a reading of, in the order of METRICS.

    Of several devices each has a row of its own. What was read without labels is left out (`unlabelled`).
    """
    present = {r.metric for r in (*report.before, *report.after)} - set(UNLABELLED)
    metrics = [m for m in METRICS if m in present] + sorted(present - set(METRICS))
    pairs = [
        (m, find(view.before, m), find(view.after, m)) for m in metrics for view in per_device.views(report)
    ]
    return [_row(metric, before, after) for metric, before, after in pairs if before or after]


def leading(report: Report) -> dict[str, Row]:
    """Metric -> the row that speaks for it: that of the first device which has a value of the compressed file."""
    found: dict[str, Row] = {}
    for row in comparison(report):
        if row.metric not in found or value_of(found[row.metric].after) is None:
            found[row.metric] = row
    return found


def ledger(report: Report) -> list[LedgerRow]:
    """The accuracies after each stage, in the order in which they were taken."""
    return [_ledger_row(reading) for reading in report.ledger]


def find(readings: Sequence[Reading], metric: str) -> Reading | None:
    """The reading of a metric: the first that has a value, else the first that says why it has none."""
    found = [r for r in readings if r.metric == metric]
    return next((r for r in found if value_of(r) is not None), found[0] if found else None)


def value_of(reading: Reading | None) -> float | None:
    """The reading's value, None when there is no reading, no value, or no finite one."""
    if reading is None or reading.value is None or not math.isfinite(reading.value):
        return None
    return reading.value


def text_of(reading: Reading | None) -> str:
    """The value as people read it; "-" when there is none."""
    return quantity(value_of(reading), unit_of(reading)) if reading else "-"


def interval_of(reading: Reading | None) -> tuple[float, float] | None:
    """The reading's 95 % interval, None when it has none."""
    if value_of(reading) is None or reading is None or reading.spread is None:
        return None
    low, high = reading.spread
    return (low, high) if math.isfinite(low) and math.isfinite(high) and low <= high else None


def interval_text(reading: Reading | None) -> str:
    """The 95 % interval as "LOW to HIGH", "" when there is none."""
    interval = interval_of(reading)
    return " to ".join(quantity(end, unit_of(reading)) for end in interval) if interval and reading else ""


def exact_text(reading: Reading) -> str:
    """The value in its base unit, unrounded."""
    return f"{reading.value:.9g} {unit_of(reading)}".strip()


def unit_of(reading: Reading) -> str:
    """The base unit of a reading; METRICS decides, the reading itself only for metrics it does not know."""
    return METRICS[reading.metric].unit if reading.metric in METRICS else reading.unit


def quantity(value: float | None, unit: str) -> str:
    """A number in a base unit as people read it; in a unit that is not ours, the number and the unit."""
    if value is None or unit in ("s", "B", "J", "", "fraction", "dB"):
        return show(value, unit)
    return f"{value:.4g} {unit}"


def provenance(reading: Reading) -> str:
    """How and where: "measured on local x86_64", "counted", "computed: ...", "estimated: ...", "not available: ..."."""
    if value_of(reading) is None:
        return f"not available: {reading.conditions.get('why') or 'no reason was recorded'}"
    how = reading.where or "unknown"
    if is_place(reading.where):
        how = f"measured on {how}"
    elif reading.where and not reading.where.startswith(("counted", "computed: ", "estimated: ")):
        how = f"not known to be measured: {how}"
    return how + _radius(reading.conditions)


def change(before: Reading, after: Reading) -> tuple[str, bool | None]:
    """By how much a metric changed, in words, and whether that is better.

    Speed is a factor: of runs timed in turn, else of the two times when their 95 % intervals do not overlap.
    Accuracies are in percentage points, everything else in percent of the dense model. Readings that were taken in
    different ways are not compared.
    """
    old, new = value_of(before), value_of(after)
    if old is None or new is None:
        return "-", None
    if provenance(before) != provenance(after):
        return "not comparable", None
    if after.metric in SPEED:
        return _speed(before, after)
    less_is_better = METRICS[after.metric].less_is_better if after.metric in METRICS else None
    better = None if less_is_better is None or old == new else (new < old) == less_is_better
    if unit_of(after) == "fraction":
        points = round(100 * (new - old), 2)
        words = f"{points:+.2f} pp" if points else "0.00 pp"
        return words, better if points and not _overlap(before, after) else None
    if after.metric in WOBBLY and abs(new - old) < SAME_SHARE * abs(old):
        better = None
    return _percent(old, new), better


def heading(report: Report) -> tuple[str, str]:
    """The model's name and the target's, as the recipe says them."""
    model = report.recipe.get("model")
    table = model if isinstance(model, Mapping) else {}
    path, arch = str(table.get("path") or ""), str(table.get("arch") or "")
    name = path.replace("\\", "/").rstrip("/").rpartition("/")[2]
    return name or arch or "model", str(report.recipe.get("target") or "unknown target")


def number_in(row: Mapping[str, Any], key: str) -> float | None:
    """A layer row's number, None when it is missing, not a number, not finite or negative."""
    value = number(row.get(key))
    return value if value is not None and value >= 0 else None


def number(value: Any) -> float | None:
    """A number from a report's JSON, None for anything else; a JSON integer may be longer than any float."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or abs(value) > _LARGEST:
        return None
    return float(value) if math.isfinite(value) else None


def layer_table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The layers as text: headings, and for each layer its name, operator, "before -> after", and why it stayed."""
    counted = any(number_in(row, key) is not None for row in rows for key in NONZERO[1:3])
    columns = (*LAYER_COLUMNS[:2], NONZERO, *LAYER_COLUMNS[2:]) if counted else LAYER_COLUMNS
    names = {"params": "parameters"}
    head = ["layer", "operator", *(names.get(c[0], c[0]) for c in columns), "why it was kept whole"]
    return head, [_layer_cells(row, columns) for row in rows]


READING_COLUMNS = ("metric", "of", "value", "95 % interval", "n", "how and where", "conditions")


def reading_table(report: Report) -> list[list[str]]:
    """One row a reading, with everything that it was taken under."""
    table = []
    for r in (*report.before, *report.after):
        conditions = "; ".join(f"{key} {value}" for key, value in facts(r.conditions) if key != "why")
        table.append(
            [r.metric, r.artifact, text_of(r), interval_text(r), str(r.n), provenance(r), conditions]
        )
    return table


def _layer_cells(row: Mapping[str, Any], columns: Sequence[tuple[str, str, str, str]]) -> list[str]:
    cells = [str(row.get("layer") or "-"), str(row.get("op") or "-")]
    for _, before, after, unit in columns:
        old, new = number_in(row, before), number_in(row, after)
        cells.append("-" if old is None and new is None else f"{_count(old, unit)} -> {_count(new, unit)}")
    return [*cells, str(row.get("why_kept") or "")]


def facts(table: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A nested table as flat (dotted key, text) pairs; empty values are left out."""
    flat: list[tuple[str, str]] = []
    for key, value in table.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat += facts(value, f"{name}.")
        elif isinstance(value, (list, tuple)) and any(isinstance(v, Mapping) for v in value):
            flat += facts({str(i + 1): v for i, v in enumerate(value)}, f"{name}.")
        elif isinstance(value, (list, tuple)):
            flat += [(name, ", ".join(_fact(v) for v in value))] if value else []
        elif value is not None and value != "":
            flat.append((name, _fact(value)))
    return flat


def _row(metric: str, before: Reading | None, after: Reading | None) -> Row:
    words, better = change(before, after) if before and after else ("-", None)
    about = METRICS[metric].about if metric in METRICS else ""
    return Row(
        metric, about, text_of(before), text_of(after), words, _how(before, after), better, before, after
    )


def _how(before: Reading | None, after: Reading | None) -> str:
    sides = [provenance(r) for r in (before, after) if r is not None]
    if len(set(sides)) == 1:
        return sides[0]
    return f"dense {sides[0]}; compressed {sides[1]}"


def _speed(before: Reading, after: Reading) -> tuple[str, bool | None]:
    ratio = speedup.ratio_of(before, after)
    if ratio is None:
        return "-", None
    least = speedup.least(same_work=after.conditions.get("same_work") is True)
    timed = speedup.speedup(after) or (speedup.interval(before) and speedup.interval(after))
    if timed and ratio.low <= 1 <= ratio.high:
        return "within noise", None
    if max(ratio.value, 1 / ratio.value) < least or after.conditions.get("nothing_removed") is True:
        return "unchanged", None
    if not timed:
        return f"{ratio.value:.2f}x, uncertain", None
    if ratio.value > 1:
        return f"{ratio.value:.2f}x faster", True
    return f"{1 / ratio.value:.2f}x slower", False


def _overlap(before: Reading, after: Reading) -> bool:
    one, two = interval_of(before), interval_of(after)
    return bool(one and two and one[0] <= two[1] and two[0] <= one[1])


def _percent(old: float, new: float) -> str:
    if old == new:
        return "unchanged"
    if old <= 0:
        return "-"
    percent = 100 * (new / old - 1)
    if abs(percent) < 0.05:
        return f"{'+' if percent > 0 else '-'}<0.1 %"
    return f"{percent:+.1f} %" if abs(percent) < 1000 else f"{percent:+.0f} %"


def _ledger_row(reading: Reading) -> LedgerRow:
    interval = interval_of(reading)
    text = text_of(reading)
    if interval and unit_of(reading) == "fraction":
        text += f" ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"
    elif interval:
        text += f" ({quantity(interval[0], unit_of(reading))} to {quantity(interval[1], unit_of(reading))})"
    elif value_of(reading) is None:
        text = provenance(reading)
    low, high = interval if interval else (None, None)
    stage = str(reading.conditions.get("stage") or reading.artifact or "-")
    return LedgerRow(
        reading.metric,
        stage,
        unit_of(reading),
        value_of(reading),
        low,
        high,
        reading.n,
        text,
        provenance(reading),
    )


def _radius(conditions: Mapping[str, Any]) -> str:
    if not conditions.get("eps") or not conditions.get("norm"):
        return ""
    attack = conditions.get("attack")
    words = f"{conditions['norm']} {conditions['eps']}"
    return f", under {attack}, {words}" if attack else f", within {words}"


def _count(value: float | None, unit: str) -> str:
    if value is None:
        return "?"
    return f"{value:.0f}" if not unit and value < 10000 else show(value, unit)


def _fact(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if value.is_integer() and abs(value) < EXACT else f"{value:.5g}"


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
        if any(number(row.get(key)) is not None for row in tried)
    ]
    rows = [
        [
            str(row.get("name") or row.get("precision") or "-"),
            *(quantity(number(row.get(key)), unit) for key, _, unit in used),
            _end(row),
        ]
        for row in tried
    ]
    return ["candidate", *(head for _, head, _ in used), "outcome"], rows


def _end(row: Mapping[str, Any]) -> str:
    layers = row.get("fallback")
    kept = [str(name) for name in layers] if isinstance(layers, (list, tuple)) else []
    words = "ships" if row.get("chosen") is True else str(row.get("why_not") or "-")
    return f"{words}; float: {', '.join(kept)}" if kept else words
