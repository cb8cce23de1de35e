"""What the gate makes of a compressed model that is not faster: a limit on its time in % is not met by it.

Light: only the standard library and the light files.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgeprune import speed
from edgeprune.records import Limit, Reading, Report
from edgeprune.stages.gate_pairs import find, value_of

MEDIAN = "latency_p50"


@dataclass(frozen=True)
class Speed:
    """What the report says of its speed. verdict: of `speed.verdict_on`; "" where there is none. words: to show."""

    verdict: str = ""
    words: str = ""


def of(limit: Limit, after: Reading, report: Report) -> Speed:
    """The verdict that a limit on a time in % asks for: that of the medians at the place of its reading.

    Args:
        limit: any limit; one that is no share, or not of a time, asks for nothing.
        after: the reading that is held against it. report: of one device.
    """
    if limit.kind != "share" or not limit.metric.startswith("latency"):
        return Speed()
    pair = _pair(MEDIAN, after.where, report) or _pair(limit.metric, after.where, report)
    ratio = speed.ratio_of(*pair) if pair else None
    if pair is None or ratio is None:
        return Speed()
    found = speed.verdict_on(*pair)
    if found not in (speed.NOT_FASTER, speed.UNDECIDED):
        return Speed(found)
    known = f" (95 % interval {ratio.low:.3f}-{ratio.high:.3f})" if ratio.low < ratio.high else ""
    said = "not faster" if found == speed.NOT_FASTER else "not shown to be faster"
    words = (
        f"{said}: {ratio.value:.3f}x the speed of the dense model{known}, and a limit in % asks for a gain"
    )
    return Speed(found, words)


def status(held: str, found: Speed) -> str:
    """The status of a check that is `held` by its numbers alone: of no gain "fail", of a doubtful one no pass."""
    if found.verdict == speed.NOT_FASTER:
        return "fail"
    return "inconclusive" if found.verdict == speed.UNDECIDED and held == "pass" else held


def _pair(metric: str, where: str, report: Report) -> tuple[Reading, Reading] | None:
    """The dense and the compressed reading of a time at one place, where both have a value."""
    before, after = (
        find([r for r in rows if r.where == where], metric) for rows in (report.before, report.after)
    )
    if before is None or after is None or value_of(before) is None or value_of(after) is None:
        return None
    return before, after
