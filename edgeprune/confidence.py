"""95 % intervals in plain Python: of a share (exact binomial), of a quantile (order statistics); and a paired test.

Nothing is assumed about the distribution of the samples but that they are independent.
"""

from __future__ import annotations

import math
from typing import Callable, Optional, Sequence, Tuple

LEVEL = 0.95
_TINY = 1e-300


def binomial(k: int, n: int, level: float = LEVEL) -> Tuple[float, float]:
    """Exact (Clopper-Pearson) interval of a share of which k in n were seen."""
    if not 0 <= k <= n or n < 1 or not 0.0 < level < 1.0:
        raise ValueError(
            f"a share needs 0 <= k <= n, n >= 1 and a level in (0, 1), got {k} of {n} at {level}"
        )
    tail = (1.0 - level) / 2.0
    low = 0.0 if k == 0 else _inverse_beta(tail, k, n - k + 1)
    high = 1.0 if k == n else _inverse_beta(1.0 - tail, k + 1, n - k)
    return low, high


def mcnemar(gained: int, lost: int) -> float:
    """McNemar's exact test of paired outputs: the two-sided probability of as uneven a split, if both are as good.

    That is twice the smaller tail of a binomial with probability 1/2, at most 1; 1 when nothing differs.
    """
    if gained < 0 or lost < 0:
        raise ValueError(f"counts must be at least 0, got {gained} and {lost}")
    n, fewer = gained + lost, min(gained, lost)
    tail = sum(math.comb(n, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**n)


def quantile(ordered: Sequence[float], q: float) -> float:
    """The q-quantile of samples in ascending order, linear between neighbors."""
    if not ordered or not 0.0 <= q <= 1.0:
        raise ValueError(f"a quantile needs samples and q in [0, 1], got {len(ordered)} samples and q = {q}")
    place = q * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def quantile_interval(
    ordered: Sequence[float], q: float, level: float = LEVEL
) -> Optional[Tuple[float, float]]:
    """The two samples between which the true q-quantile lies, by order statistics.

    Each side may miss with at most (1 - level) / 2. None when there are too few samples for that (the median needs 6).
    """
    if not 0.0 < q < 1.0 or not 0.0 < level < 1.0:
        raise ValueError(f"q and level must be in (0, 1), got {q} and {level}")
    n, tail = len(ordered), (1.0 - level) / 2.0
    # The j-th smallest (1-based) is above the quantile when fewer than j samples are below it.
    low = _last(n, lambda j: _binomial_cdf(j - 1, n, q) <= tail)
    high = _last(n, lambda j: 1.0 - _binomial_cdf(n - j, n, q) <= tail)
    if low == 0 or high == 0:
        return None
    return ordered[low - 1], ordered[n - high]


def _last(n: int, holds: Callable[[int], bool]) -> int:
    """The largest j in 1..n for which `holds`, which is true up to some j and false after it; 0 for none."""
    below, above = 0, n + 1
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (middle, above) if holds(middle) else (below, middle)
    return below


def _binomial_cdf(k: int, n: int, p: float) -> float:
    if k < 0:
        return 0.0
    return 1.0 if k >= n else _beta(1.0 - p, n - k, k + 1)


def _inverse_beta(share: float, a: float, b: float) -> float:
    """x with I_x(a, b) = share, by halving; the function rises, so this can't miss."""
    low, high = 0.0, 1.0
    while True:
        middle = (low + high) / 2.0
        if middle in (low, high):
            return middle
        low, high = (middle, high) if _beta(middle, a, b) < share else (low, middle)


def _beta(x: float, a: float, b: float) -> float:
    """The regularized incomplete beta function I_x(a, b), by its continued fraction."""
    if x <= 0.0 or x >= 1.0:
        return 0.0 if x <= 0.0 else 1.0
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    front = math.exp(log_front)
    # The fraction converges fast only on its own side of the mean; the other side follows by symmetry.
    if x < (a + 1.0) / (a + b + 2.0):
        return front * _fraction(x, a, b) / a
    return 1.0 - front * _fraction(1.0 - x, b, a) / b


def _fraction(x: float, a: float, b: float) -> float:
    c, d = 1.0, 1.0 / _away_from_zero(1.0 - (a + b) * x / (a + 1.0))
    value = d
    for m in range(1, 100_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1.0 / _away_from_zero(1.0 + term * d)
            c = _away_from_zero(1.0 + term / c)
            value *= c * d
        if abs(c * d - 1.0) < 1e-15:
            break
    return value


def _away_from_zero(value: float) -> float:
    return value if abs(value) > _TINY else _TINY
