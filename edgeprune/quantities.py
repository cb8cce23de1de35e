"""Text with a unit to a number in the base unit, and back: "12 ms" is 0.012, "8/255" is a fraction."""

from __future__ import annotations

import difflib
import math
import re
from typing import Iterable, Optional

from edgeprune.errors import UsageError
from edgeprune.records import METRICS, Limit

# ASCII: float() and \d know the digits of all scripts, which look like others.
_NUMBER = re.compile(
    r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(?:/\s*(\d+(?:\.\d+)?))?\s*([A-Za-zµ%]*)\s*", re.ASCII
)
_POINTS = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+))\s*pp", re.ASCII)
# A limit of more than this many times the dense model's is none.
_MOST_SHARE = 100.0
_SCALES = {
    "s": {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9},
    "B": {
        "B": 1.0,
        "kB": 1e3,
        "KB": 1e3,
        "MB": 1e6,
        "GB": 1e9,
        "KiB": 2.0**10,
        "MiB": 2.0**20,
        "GiB": 2.0**30,
    },
    "J": {"J": 1.0, "mJ": 1e-3, "uJ": 1e-6, "µJ": 1e-6},
    "dB": {"dB": 1.0},
    "": {
        "": 1.0,
        "k": 1e3,
        "K": 1e3,
        "M": 1e6,
        "G": 1e9,
        "MMACs": 1e6,
        "GMACs": 1e9,
        "MMAC": 1e6,
        "GMAC": 1e9,
    },
    "fraction": {"": 1.0, "%": 1e-2},
}

USUAL_EPS = {"Linf": 8 / 255, "L2": 128 / 255}
# A larger radius was meant in levels of 255: an Linf ball of 1 is every image there is, and an L2 ball of 20
# makes any photograph of 3x224x224 unrecognizable.
LARGEST_EPS = {"Linf": 1.0, "L2": 20.0}
# As far as levels of 255 can be meant: from half the range of pixels on, any image may become gray.
MEANT_EPS = {"Linf": 0.5, "L2": 20.0}


def suggest(name: str, known: Iterable[str]) -> str:
    """The sentence "did you mean ...?" for the closest known name, or the list of all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return "accepted: " + ", ".join(known) if known else ""


def check_choice(name: str, value: str, accepted: Iterable[str]) -> None:
    """Refuse a setting whose value is none of the accepted ones."""
    if value not in accepted:
        raise UsageError(
            f"{name} = {value!r} is not one of {', '.join(accepted)}", suggest(str(value), accepted)
        )


def number(text: str, unit: str) -> float:
    """Read a finite quantity of the base unit "s", "B", "J", "dB", "" (a count) or "fraction"."""
    match = _NUMBER.fullmatch(text)
    scales = _SCALES[unit]
    if not match or match.group(3) not in scales:
        accepted = ", ".join(u or "no unit" for u in scales)
        raise UsageError(f"{text!r} is not a quantity of that kind", f"give a number with one of: {accepted}")
    below = float(match.group(2) or 1.0)
    value = float(match.group(1)) / below * scales[match.group(3)] if below else math.inf
    if not math.isfinite(value):
        raise UsageError(f"{text!r} is not a finite number")
    return value


def limit(metric: str, text: object) -> Limit:
    """Read one limit of a budget: absolute with a unit, "50 %" of the dense model, or "-1 pp" for accuracies."""
    if metric not in METRICS:
        raise UsageError(f"unknown metric {metric!r} in the budget", suggest(metric, METRICS))
    info, raw = METRICS[metric], str(text).strip()
    points = _POINTS.fullmatch(raw)
    if points:
        if info.less_is_better or info.unit != "fraction":
            raise UsageError(f"{metric}={raw}: percentage points are for accuracies", f"write {metric}=50 %")
        delta = float(points.group(1)) / 100.0
        if not -1.0 <= delta <= 1.0:
            raise UsageError(f"{metric}={raw} must be between -100 and 100 pp", f"write {metric}=-1 pp")
        return Limit(metric, "delta", delta, raw)
    if info.unit == "fraction":
        value = number(raw, "fraction")
        if not 0.0 <= value <= 1.0:
            raise UsageError(
                f"{metric}={raw} must be between 0 and 100 %", f"write {metric}=90 % or {metric}=-1 pp"
            )
        return Limit(metric, "absolute", value, raw)
    if raw.endswith("%") and info.less_is_better:
        return _share(metric, raw)
    value = _absolute(metric, raw, info.unit)
    return Limit(metric, "absolute", value, raw)


def _share(metric: str, raw: str) -> Limit:
    share = number(raw, "fraction")
    if share <= 0:
        raise UsageError(f"{metric}={raw} must be more than 0 % of the dense model", f"write {metric}=50 %")
    if share > _MOST_SHARE:
        raise UsageError(f"{metric}={raw} must be at most {100 * _MOST_SHARE:.0f} %", f"write {metric}=50 %")
    return Limit(metric, "share", share, raw)


def _absolute(metric: str, raw: str, unit: str) -> float:
    if unit and re.match(r"^[+-]?[\d.]+$", raw):
        example = next(iter(_SCALES[unit])) if unit != "s" else "ms"
        raise UsageError(
            f"{metric}={raw} has no unit",
            f"write {metric}={raw} {example}, or {metric}=50 % of the dense model",
        )
    value = number(raw, unit)
    if value <= 0:
        raise UsageError(f"{metric}={raw} must be more than 0")
    least, most = METRICS[metric].low, METRICS[metric].high
    if not least <= value <= most:
        raise UsageError(f"{metric}={raw} must be between {least:g} and {most:g} {unit}".rstrip())
    return value


def show(value: Optional[float], unit: str) -> str:
    """A number in the base unit as people read it: 0.0123 "s" is "12.3 ms". None is "-"."""
    if value is None:
        return "-"
    if unit == "fraction":
        return f"{100 * value:.2f} %"
    if unit == "dB":
        return f"{value:.1f} dB"
    steps = {
        "s": ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")),
        "B": ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B")),
        "J": ((1.0, "J"), (1e-3, "mJ")),
        "": ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, "")),
    }[unit]
    scale, name = next(((s, n) for s, n in steps if abs(value) >= s), steps[-1])
    # 999.5 and more would round to "1e+03" in three digits.
    digits = f"{value / scale:.3g}" if abs(value / scale) < 999.5 else f"{value / scale:.0f}"
    return f"{digits} {name}".strip()


def eps_of(text: str, norm: str) -> float:
    """Read the radius of an attack: "8/255", "0.03" or "3 %" of the range of pixels; "" is the norm's usual one."""
    check_choice("norm", norm, USUAL_EPS)
    if not text.strip():
        return USUAL_EPS[norm]
    value = number(text, "fraction")
    if value <= 0:
        raise UsageError(f"eps = {text} must be more than 0", "for example 8/255")
    if value > LARGEST_EPS[norm]:
        found = f"eps = {text} is too large for {norm}: pixels are in [0, 1]"
        usual = f"for example {255 * USUAL_EPS[norm]:g}/255"
        meant = f"did you mean {value:g}/255?" if value < 255 * MEANT_EPS[norm] else usual
        raise UsageError(f"{found}, accepted is at most {LARGEST_EPS[norm]:g}", meant)
    return value
