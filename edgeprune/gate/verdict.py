"""Hold a report against a budget: every limit passes, fails, misses its reading, or can't be told."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from edgeprune.gate import comparison
from edgeprune.gate.comparison import worst
from edgeprune.quantities import show
from edgeprune.recipe import ALLOW_ESTIMATES
from edgeprune.records import METRICS, Budget, Check, Limit, Reading, Report, Verdict
from edgeprune.report import find, unread, value_of, views, where_of

TIMED = ("latency_p50", "latency_p90", "latency_p99", "energy")
OF_THE_MACHINE = (*TIMED, "peak_memory")
# What every device gives, or says why not.
ALWAYS = ("latency_p50", "latency_p90", "latency_p99", "peak_memory")
# A share of a count is rounded in the last bits; that must not decide whether a limit is met exactly.
ROUNDING = 1e-12


@dataclass(frozen=True)
class _Reference:
    """What a relative limit is relative to. name: "dense" or "baseline"; remark: what the reader must know."""

    name: str
    reading: Reading | None
    remark: str = ""


def run(
    report: Report,
    budget: Budget,
    baseline: Report | None,
    *,
    baseline_missing: bool,
    must_be_faster: bool = True,
) -> Verdict:
    """Check every limit against the compressed model's readings.

    Relative limits are relative to the baseline's compressed model when there is a baseline, else to the dense
    model of this report. baseline_missing: a baseline was named, and its file is not there yet. Of several devices
    the one that comes off worst decides each limit. must_be_faster: a limit on a time in % is missed by a model that
    is not faster than the dense one, whatever the limit.
    """
    first, *further = (_ordered(view, budget) for view in views(report))
    bases = (
        {where_of(view): _ordered(view, budget) for view in views(baseline)} if baseline is not None else {}
    )
    checks: list[Check] = []
    for limit in budget.limits.values():
        held = [view for view in (first, *further) if not further or not _silent(limit.metric, view)] or [
            first
        ]
        found = {
            _place(limit.metric, view): _not_measured(limit, view, budget)
            or _check(limit, view, _base(bases, view), must_be_faster)
            for view in held
        }
        checks.append(worst(found, alone=held == [first]))
    statuses = {check.status for check in checks}
    exit_code = 1 if "fail" in statuses else 8 if statuses - {"pass"} else 0
    notes = [*_baseline_notes(report, budget, baseline, baseline_missing)]
    if all(where_of(view).startswith(("local", "fake")) for view in further):
        notes += _target_notes(first, budget)
    notes += [f"Without readings of {url}: {why}" for url, why in unread(report).items()]
    return Verdict(tuple(checks), exit_code == 0, exit_code, tuple(notes))


def _silent(metric: str, view: Report) -> bool:
    """Whether one of several devices decides nothing: it says why it has no reading, or none is to be expected."""
    after = find(view.after, metric)
    if after is None:
        return metric not in ALWAYS
    return value_of(after) is None and bool(after.conditions.get("why"))


def _place(metric: str, view: Report) -> str:
    after = find(view.after, metric)
    return after.where if after is not None else where_of(view) or "the first device"


def _base(bases: Mapping[str, Report], view: Report) -> Report | None:
    """The baseline at the place of a view; a device that it did not have is one without readings."""
    if not bases:
        return None
    return bases.get(where_of(view), replace(bases[""], before=(), after=()))


def _ordered(report: Report, budget: Budget) -> Report:
    """Measurements first; where estimates are allowed, those of the target before measurements elsewhere."""

    def rank(reading: Reading) -> int:
        if not reading.measured:
            return 1
        instead = _elsewhere(reading.metric, reading, report) or _emulated(reading)
        return 2 if budget.allow_estimates and instead else 0

    before, after = (tuple(sorted(rows, key=rank)) for rows in (report.before, report.after))
    return replace(report, before=before, after=after)


def _emulated(reading: Reading) -> bool:
    return bool(reading.conditions.get("emulated")) or reading.where.endswith("(emulated)")


def _not_measured(limit: Limit, report: Report, budget: Budget) -> Check | None:
    after = find(report.after, limit.metric)
    if after is None:
        return None
    if limit.metric in OF_THE_MACHINE and _emulated(after):
        why = f"{after.where}: an emulated processor says nothing about the time of a real one"
    elif not after.measured and not budget.allow_estimates:
        why = f"only {_estimated(after)}: measure it with --device, or accept estimates with --budget {ALLOW_ESTIMATES}"
    else:
        return None
    return Check(limit.metric, limit.text, "missing", value_of(after), None, None, why)


def _estimated(reading: Reading) -> str:
    known = reading.where.startswith("estimated: ")
    return reading.where if known else f"{reading.where!r:.80}, which is not known to be a measurement"


def _check(limit: Limit, report: Report, baseline: Report | None, must_be_faster: bool) -> Check:
    after = find(report.after, limit.metric)
    value = value_of(after)
    reference = _reference(limit, report, baseline)
    threshold = _threshold(limit, reference)
    remarks = [reference.remark] if reference and reference.remark else []
    if value is None or after is None or threshold is None:
        detail = "; ".join([*_missing(limit.metric, after, reference), *remarks])
        return Check(limit.metric, limit.text, "missing", value, threshold, None, detail)
    margin = threshold - value if METRICS[limit.metric].less_is_better else value - threshold
    if math.isclose(value, threshold, rel_tol=ROUNDING, abs_tol=ROUNDING):
        margin = 0.0
    doubt = (
        _unlike(limit.metric, after, reference, report, baseline)
        or _unchecked(after)
        or _noise(limit, threshold, after, reference, report)
    )
    status = "inconclusive" if doubt else "pass" if margin >= 0 else "fail"
    speed = comparison.of(limit, after, report)
    status = comparison.status(status, speed) if must_be_faster else status
    remarks += [text for text in (speed.words, doubt) if text]
    remarks += [str(after.conditions["no_interval"])] if after.conditions.get("no_interval") else []
    remarks += _where(limit.metric, after, report)
    return Check(limit.metric, limit.text, status, value, threshold, margin, "; ".join(remarks))


def _missing(metric: str, after: Reading | None, reference: _Reference | None) -> list[str]:
    why = []
    if value_of(after) is None:
        why.append(f"the compressed model has no {metric}{_why(after)}")
    if reference is not None and value_of(reference.reading) is None:
        why.append(f"no {metric} of the {reference.name} model to compare with{_why(reference.reading)}")
    return why


def _unchecked(after: Reading) -> str:
    if not after.measured and after.spread is None:
        why = after.conditions.get("validation")
        reason = why.removeprefix("none: ") if isinstance(why, str) else "no layer times to compare it with"
        return f"the estimate was not validated: {reason}"
    return ""


def _noise(
    limit: Limit, threshold: float, after: Reading, reference: _Reference | None, report: Report
) -> str:
    low, high = _interval(limit, after, reference, report)
    if not low < threshold < high:
        return ""
    unit = METRICS[limit.metric].unit
    busy = " of times taken while other work ran" if after.conditions.get("contended") is True else ""
    return f"noise: the limit lies inside the 95 % interval {show(low, unit)} to {show(high, unit)}{busy}"


def _reference(limit: Limit, report: Report, baseline: Report | None) -> _Reference | None:
    if limit.kind == "absolute":
        return None
    dense = find(report.before, limit.metric)
    if baseline is None:
        return _Reference("dense", dense)
    base = find(baseline.after, limit.metric)
    if value_of(base) is not None:
        return _Reference("baseline", base)
    return _Reference("dense", dense, f"the baseline has no {limit.metric}: held against the dense model")


def _threshold(limit: Limit, reference: _Reference | None) -> float | None:
    if reference is None:
        return limit.value
    value = value_of(reference.reading)
    return None if value is None else limit.threshold(value)


def _interval(
    limit: Limit, after: Reading, reference: _Reference | None, report: Report
) -> tuple[float, float]:
    """The 95 % interval to hold against the threshold, the noise of the reference included; around the value."""
    value = value_of(after) or 0.0
    below, above = _widths(after)
    if reference is None or reference.reading is None:
        return value - below, value + above
    paired = None
    if reference.name == "dense":
        paired = comparison.interval(limit.metric, after, reference.reading, find(report.after, "agreement"))
    if paired:
        return min(paired[0], value), max(paired[1], value)
    if METRICS[limit.metric].unit == "fraction" and reference.reading.n == after.n:
        # On the same images most of the noise is shared: adding that of the reference would count it twice.
        return value - below, value + above
    factor = limit.value if limit.kind == "share" else 1.0
    other_below, other_above = _widths(reference.reading)
    # The threshold moves with the reference: a larger one comes nearer to a value above it.
    return value - math.hypot(below, factor * other_above), value + math.hypot(above, factor * other_below)


def _widths(reading: Reading) -> tuple[float, float]:
    value = value_of(reading)
    if value is None:
        return 0.0, 0.0
    low, high = reading.spread or (value, value)
    idle = reading.conditions.get("cpu_p50")
    if reading.conditions.get("contended") is True and isinstance(idle, float) and idle > 0:
        # On an idle machine it would have taken at least its CPU time: how much more, nobody can tell.
        low = min(low, idle)
    return max(value - low, 0.0), max(high - value, 0.0)


def _unlike(
    metric: str, after: Reading, reference: _Reference | None, report: Report, baseline: Report | None
) -> str:
    """Why a reading and its reference can't be compared at all; empty when they can."""
    if reference is None or reference.reading is None:
        return ""
    if metric == "robust_accuracy":
        return comparison.unlike_attacks(after, reference.reading, reference.name)
    # Sizes and accuracies of two machines are comparable with a baseline; a run reads its own two files at one place.
    elsewhere = reference.reading.where != after.where and (
        reference.name == "dense" or metric in OF_THE_MACHINE
    )
    if elsewhere or reference.reading.measured != after.measured:
        return f"not comparable: the {reference.name} one is {reference.reading.where!r}, this one {after.where!r}"
    if reference.name != "baseline" or baseline is None or metric not in TIMED:
        return ""
    was, now = _cpu(baseline), _cpu(report)
    if was and now and was != now:
        return f"not comparable: the baseline was timed on {was}, this one on {now}"
    return ""


def _cpu(report: Report) -> str:
    device = report.environment.get("device")
    return str(device.get("cpu") or "") if isinstance(device, Mapping) else ""


def _where(metric: str, after: Reading, report: Report) -> list[str]:
    if not after.measured:
        return [f"not measured, {_estimated(after)}"]
    target = _elsewhere(metric, after, report)
    return [f"measured on {after.where}, not on {target}"] if target else []


def _elsewhere(metric: str, after: Reading, report: Report) -> str:
    target = str(report.recipe.get("target") or "local")
    taken_here = metric in OF_THE_MACHINE and after.where.startswith("local")
    return (
        target if taken_here and target != "local" and after.conditions.get("on_target") is not True else ""
    )


def _baseline_notes(report: Report, budget: Budget, baseline: Report | None, missing: bool) -> list[str]:
    relative = [limit.metric for limit in budget.limits.values() if limit.kind != "absolute"]
    if baseline is None:
        if not missing:
            return []
        held = " Relative limits were held against the dense model of this run." if relative else ""
        return [f"There is no baseline yet.{held} Keep this run's report.json as the baseline of the next."]
    notes = []
    was, now = baseline.recipe.get("target"), report.recipe.get("target")
    if was != now:
        notes.append(f"The baseline is a run for {was}, this one is for {now}.")
    old, new = (value_of(find(one.before, "params")) for one in (baseline, report))
    if old is not None and new is not None and old != new:
        notes.append(
            f"The baseline is of another network: {old:.0f} parameters before it was cut, here {new:.0f}."
        )
    if not relative:
        notes.append("Every limit is absolute, so the baseline was not used.")
    return notes


def _target_notes(report: Report, budget: Budget) -> list[str]:
    found = [(metric, find(report.after, metric)) for metric in budget.limits]
    local = [
        (m, r) for m, r in found if r is not None and value_of(r) is not None and _elsewhere(m, r, report)
    ]
    if not local:
        return []
    names, target = ", ".join(metric for metric, _ in local), report.recipe.get("target")
    return [f"Not measured on {target}: {names} (taken on {local[0][1].where}; the target may differ)."]


def _why(reading: Reading | None) -> str:
    why = reading.conditions.get("why") if reading is not None else None
    return f" ({why})" if why else ""
