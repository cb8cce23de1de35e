"""Which precision ships when none was named: the fastest on the device that stays within the accuracy budgets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from edgeprune.quantities import show
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
class Pick:
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
) -> Pick:
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
    return Pick(chosen.precision, why_not)


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
