"""Whether a compressed model is faster than the dense one: one rule for the report's words and for the gate."""

from collections.abc import Mapping
from dataclasses import dataclass

from edgeprune.records import Reading

# Two sessions of the very same file differ by up to this factor from one process to the next: where their memory
# lands decides. Less than that is no gain, however narrow the interval of one process is.
SAME = 1.02
# Where both files do the same work, as when only single weights were set to zero, a gain needs more than chance.
SAME_WORK = 1.05
# Wider than this, an interval round 1 says that the machine was too busy to decide.
WIDE = 1.05
FASTER, UNDECIDED, NOT_FASTER = "faster", "undecided", "not faster"


@dataclass(frozen=True)
class Ratio:
    """How many times faster the compressed model is, and its 95 % interval.

    n: paired ratios whose median it is; 0 where the two were not timed in turn.
    """

    value: float
    low: float
    high: float
    n: int


def least(*, same_work: bool = False) -> float:
    """The smallest ratio that is a gain. same_work: the two files do the same multiply-accumulates."""
    return SAME_WORK if same_work else SAME


def verdict(
    ratio: Ratio, *, same_work: bool = False, nothing_removed: bool = False, unsure: bool = False
) -> str:
    """FASTER, UNDECIDED or NOT_FASTER."""
    if nothing_removed:
        return NOT_FASTER
    if ratio.low > 1.0 and ratio.value >= least(same_work=same_work):
        return FASTER
    if ratio.low <= 1.0 <= ratio.high and (unsure or ratio.high / ratio.low > WIDE):
        return UNDECIDED
    return NOT_FASTER


def verdict_on(before: Reading, after: Reading) -> str:
    """`verdict` on two times of one place, from what their conditions say; "" where there is no ratio of them."""
    ratio = ratio_of(before, after)
    if ratio is None or before.where != after.where:
        return ""
    says = after.conditions
    return verdict(
        ratio,
        same_work=says.get("same_work") is True,
        nothing_removed=says.get("nothing_removed") is True,
        unsure=says.get("contended") is True,
    )


def ratio_of(before: Reading, after: Reading) -> Ratio | None:
    """How many times faster the second of two times is.

    Runs that were timed in turn shared their noise, so their ratio says more than the two times. Two estimates come
    from one formula, so their ratio has no interval; nor have times of which one has none. None without two times.
    """
    paired = speedup(after)
    if paired is not None:
        return paired
    old, new = _time(before.value), _time(after.value)
    if old is None or new is None:
        return None
    one, two = interval(before), interval(after)
    if one is None or two is None:
        return Ratio(old / new, old / new, old / new, 0)
    return Ratio(old / new, one[0] / two[1], one[1] / two[0], 0)


def speedup(after: Reading) -> Ratio | None:
    """The ratio that a time carries where dense and compressed were timed in turn; None where it is none."""
    says = after.conditions.get("speedup")
    if not isinstance(says, Mapping):
        return None
    value, low, high = (_time(says.get(key)) for key in ("value", "low", "high"))
    if value is None or low is None or high is None or not low <= value <= high:
        return None
    pairs = says.get("pairs")
    return Ratio(value, low, high, pairs if isinstance(pairs, int) else 0)


def interval(reading: Reading) -> tuple[float, float] | None:
    """The 95 % interval of a time that was measured, in s; None where it has none."""
    if reading.spread is None or not reading.measured:
        return None
    low, high = (_time(end) for end in reading.spread)
    return (low, high) if low is not None and high is not None and low <= high else None


def _time(value: object) -> float | None:
    """What is a number > 0; a whole number of JSON may be longer than any float, and is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if 0 < value < 1e300 else None
