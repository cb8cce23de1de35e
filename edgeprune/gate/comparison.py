"""How two readings of one run compare: times taken in turn, and accuracies on the same images."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from edgeprune import speedup
from edgeprune.quantities import show
from edgeprune.records import METRICS, Check, Limit, Reading, Report
from edgeprune.report import find, value_of

# Two-sided 95 % of the normal distribution.
Z = 1.959964
# What makes an attack the attack that it is; seeds and batches are noise.
ATTACK = ("attack", "norm", "eps_value")


def interval(
    metric: str, after: Reading, dense: Reading, agreement: Reading | None
) -> tuple[float, float] | None:
    """The 95 % interval of a reading, the dense one taken as exact, where both were taken in pairs; or None."""
    return (
        _times(after, dense) or _counts(metric, after, dense) or _accuracies(metric, after, dense, agreement)
    )


def unlike_attacks(after: Reading, reference: Reading, name: str) -> str:
    """Why two accuracies under attack can't be compared; empty when the same attack was made."""
    for fact in ATTACK:
        was, now = reference.conditions.get(fact), after.conditions.get(fact)
        if was != now:
            return f"not comparable: the {name} one is under {fact} {was}, this one under {now}"
    return ""


def _times(after: Reading, dense: Reading) -> tuple[float, float] | None:
    slow, speedup = value_of(dense), after.conditions.get("speedup")
    if slow is None or not isinstance(speedup, Mapping):
        return None
    low, high = speedup.get("low"), speedup.get("high")
    if not isinstance(low, float) or not isinstance(high, float) or not 0 < low <= high < math.inf:
        return None
    return slow / high, slow / low


def _counts(metric: str, after: Reading, dense: Reading) -> tuple[float, float] | None:
    """Where images gained (b) and lost (c) were counted: the change's variance is (b + c - (b - c)^2 / n) / n^2."""
    value, pair, n = value_of(after), after.conditions.get("paired"), after.n
    if not metric.endswith("accuracy") or value is None or not isinstance(pair, Mapping):
        return None
    gained, lost = pair.get("gained"), pair.get("lost")
    if (
        not isinstance(gained, int)
        or not isinstance(lost, int)
        or dense.n != n
        or not 0 <= gained + lost <= n
    ):
        return None
    half = Z * math.sqrt(max(gained + lost - (gained - lost) ** 2 / n, 0.0)) / n if n else 0.0
    return value - half, value + half


def _accuracies(
    metric: str, after: Reading, dense: Reading, agreement: Reading | None
) -> tuple[float, float] | None:
    values = (value_of(agreement), value_of(dense), value_of(after))
    if metric != "clean_accuracy" or agreement is None or agreement.n != after.n:
        return None
    shares = [share for share in values if share is not None]
    if len(shares) < 3 or after.n < 1:
        return None
    same, old, new = shares
    half = Z * math.sqrt(max(1 - same - (new - old) ** 2, 0.0) / after.n)
    return new - half, new + half


MEDIAN = "latency_p50"


@dataclass(frozen=True)
class Speed:
    """What the report says of its speed. verdict: of `speed.verdict_on`; "" where there is none. words: to show."""

    verdict: str = ""
    words: str = ""


def of(limit: Limit, after: Reading, report: Report) -> Speed:
    """The verdict on a limit on a time in %: that of the medians on the device of its reading."""
    if limit.kind != "share" or not limit.metric.startswith("latency"):
        return Speed()
    pair = _pair(MEDIAN, after.where, report) or _pair(limit.metric, after.where, report)
    ratio = speedup.ratio_of(*pair) if pair else None
    if pair is None or ratio is None:
        return Speed()
    found = speedup.verdict_on(*pair)
    if found not in (speedup.NOT_FASTER, speedup.UNDECIDED):
        return Speed(found)
    known = f" (95 % interval {ratio.low:.3f}-{ratio.high:.3f})" if ratio.low < ratio.high else ""
    speed = "not faster" if found == speedup.NOT_FASTER else "not shown to be faster"
    words = (
        f"{speed}: {ratio.value:.3f}x the speed of the dense model{known}, and a limit in % asks for a gain"
    )
    return Speed(found, words)


def status(held: str, found: Speed) -> str:
    """The status of a check that is `held` by its numbers alone: of no gain "fail", of a doubtful one no pass."""
    if found.verdict == speedup.NOT_FASTER:
        return "fail"
    return "inconclusive" if found.verdict == speedup.UNDECIDED and held == "pass" else held


def _pair(metric: str, where: str, report: Report) -> tuple[Reading, Reading] | None:
    before, after = (
        find([r for r in rows if r.where == where], metric) for rows in (report.before, report.after)
    )
    if before is None or after is None or value_of(before) is None or value_of(after) is None:
        return None
    return before, after


# From the best to the worst.
ORDER = ("pass", "missing", "inconclusive", "fail")


def worst(checks: Mapping[str, Check], *, alone: bool) -> Check:
    """The check that decides: a missed limit before one that can't be told, then the smallest margin.

    Returns:
        that check; where several devices have readings, its detail names the device, and those of the others.
    """

    def badness(place: str) -> tuple[int, float]:
        check = checks[place]
        return ORDER.index(check.status), -(check.margin or 0.0) / abs(check.threshold or 1.0)

    where = max(checks, key=badness)
    decides = checks[where]
    if alone:
        return decides
    unit = METRICS[decides.metric].unit
    rest = [
        f"{place} {show(check.value, unit)} ({check.status})"
        for place, check in checks.items()
        if place != where
    ]
    detail = f"the worst of {len(checks)} devices is {where}; {', '.join(rest)}" if rest else f"on {where}"
    return replace(decides, detail="; ".join(text for text in (detail, decides.detail) if text))
