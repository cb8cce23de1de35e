"""What two readings of one run say of each other: times taken in turn, and accuracies on the same images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from edgeprune.records import Reading

# Two-sided 95 % of the normal distribution.
Z = 1.959964
# What makes an attack the attack that it is; seeds and batches are noise.
ATTACK = ("attack", "norm", "eps_value")


def interval(
    metric: str, after: Reading, dense: Reading, agreement: Reading | None
) -> tuple[float, float] | None:
    """The 95 % interval of a reading, the dense one taken as exact, where both were taken in pairs; or None.

    Args:
        agreement: of the two networks on the same images, or None.
    """
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


def find(readings: Sequence[Reading], metric: str) -> Reading | None:
    """The first reading of a metric that has a value, or the first without one, or None."""
    found = [reading for reading in readings if reading.metric == metric]
    return next((r for r in found if value_of(r) is not None), found[0] if found else None)


def value_of(reading: Reading | None) -> float | None:
    """The value of a reading where it is there."""
    return reading.value if reading is not None else None


def _times(after: Reading, dense: Reading) -> tuple[float, float] | None:
    """Where the two were timed in turn."""
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
    """Where it is known how far two classifiers agree on the same images.

    Images that both networks classify alike can't differ in being right, so at most 1 - agreement of them do:
    the variance of the change d is at most (1 - agreement - d^2) / n.
    """
    values = (value_of(agreement), value_of(dense), value_of(after))
    if metric != "clean_accuracy" or agreement is None or agreement.n != after.n:
        return None
    shares = [share for share in values if share is not None]
    if len(shares) < 3 or after.n < 1:
        return None
    same, old, new = shares
    half = Z * math.sqrt(max(1 - same - (new - old) ** 2, 0.0) / after.n)
    return new - half, new + half
