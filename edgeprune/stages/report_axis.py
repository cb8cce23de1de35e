"""Axes of plots: how far they reach, which round numbers they show, and how a number becomes a place."""

from __future__ import annotations

import math


def widen(low: float, high: float, share: float) -> tuple[float, float]:
    """The ends of an axis, a share of its length beyond the values on both sides."""
    # One value alone, or values that hardly differ, still get an axis that can be read.
    span = max(high - low, abs(high) * 0.01, 1e-9)
    return low - share * span, high + share * span


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """At most `most` round numbers from low to high; low < high."""
    rough = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1.0, 2.0, 2.5, 5.0, 10.0) if m * power >= rough * (1 - 1e-9))
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def fixed(value: float) -> str:
    """A number for an attribute: three decimals at most, no exponent."""
    return f"{value:.3f}".rstrip("0").rstrip(".")
