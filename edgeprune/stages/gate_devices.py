"""One verdict on a limit that was held against the readings of several devices: the worst of them decides.

Light: works on checks that were made elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from edgeprune.quantities import show
from edgeprune.records import METRICS, Check

# From the best to the worst.
ORDER = ("pass", "missing", "inconclusive", "fail")


def worst(checks: Mapping[str, Check], *, alone: bool) -> Check:
    """The check that decides: a missed limit before one that can't be told, then the smallest margin.

    Args:
        checks: place -> the check of a limit there; at least one. alone: there is no other device.

    Returns:
        that check; where several places were read, its detail says at which it was, and what the others said.
    """
    where = max(checks, key=lambda place: (ORDER.index(checks[place].status), -_share(checks[place])))
    decides = checks[where]
    if alone:
        return decides
    unit = METRICS[decides.metric].unit
    rest = [
        f"{place} {show(check.value, unit)} ({check.status})"
        for place, check in checks.items()
        if place != where
    ]
    said = f"the worst of {len(checks)} devices is {where}; {', '.join(rest)}" if rest else f"on {where}"
    return replace(decides, detail="; ".join(text for text in (said, decides.detail) if text))


def _share(check: Check) -> float:
    """The margin as a share of its limit, so that limits relative to different references compare."""
    if check.margin is None or not check.threshold:
        return check.margin or 0.0
    return check.margin / abs(check.threshold)
