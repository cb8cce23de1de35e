"""Seconds of one kind of layer as a function of the channels that it reads and makes: a staircase through timings.

Runtimes work on blocks of channels, so time goes in steps. Which steps is a fact of the device that nobody tells, so it
is fitted: time is a sum, with factors >= 0, of products of widths rounded up to blocks of many sizes, and of penalties
for widths that are no multiple of a small vector (least squares of relative errors; Lawson and Hanson, "Solving Least
Squares Problems", 1974, ch. 23). What the sum leaves of the timings is added back near them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
READ_BLOCKS = (1, 4, 8, 16)
MADE_BLOCKS = (1, 4, 8, 16, 32)
# Widths that are no multiple of these may take a slower path.
VECTORS = (4, 8, 16)
# A factor must earn its place: it costs so much of the mean square of the relative error.
THRIFT = 1e-4
# Widths this many octaves apart have little to say about each other, and a timing counts as much as this.
REACH = 0.2
DOUBT = 0.3
_ROUNDS = 4
_STEPS = 3
_RIDGE = 1e-6
# Errors count relative to the time, but below this share of the longest time of its kind they count alike.
_SMALL = 0.01
_LEAST_S = 1e-8


@dataclass(frozen=True)
class Staircase:
    """Time as a sum of terms, and what it leaves of the timings.

    factors: of `_terms`, >= 0. seen: float64 (n, 2), the widths that were timed. rest: float64 (n,), the log of what
    the sum misses there.
    """

    factors: Array
    seen: Array
    rest: Array

    def at(self, reads: int, makes: int) -> float:
        """Seconds at these widths."""
        base = max(_LEAST_S, float(_terms(np.array([[reads, makes]], np.float64))[0] @ self.factors))
        gap = np.log2(self.seen / np.array([max(1, reads), max(1, makes)], np.float64))
        weight = np.exp(-((gap / REACH) ** 2).sum(1))
        return base * math.exp(float(weight @ self.rest) / (float(weight.sum()) + DOUBT))


def fit(timed: Sequence[tuple[int, int, float]]) -> Staircase:
    """The staircase through timings.

    Args:
        timed: (channels read, channels made, seconds >= 0), at least one, in any order, repeats allowed.
    """
    widths = np.array([(max(1, r), max(1, m)) for r, m, _ in timed], np.float64)
    seconds = np.array([s for _, _, s in timed], np.float64)
    scale = np.maximum(seconds, max(_LEAST_S, _SMALL * float(seconds.max())))
    terms = _terms(widths)
    trust = np.ones(len(timed))
    factors = np.zeros(terms.shape[1])
    for _ in range(_ROUNDS):
        factors = _nonnegative(terms / scale[:, None] * trust[:, None], seconds / scale * trust)
        # A timing that something disturbed is far off; it counts less then (Huber's weights).
        off = np.abs(terms @ factors - seconds) / scale
        usual = max(0.01, float(np.median(off)))
        trust = np.sqrt(np.minimum(1.0, 2 * usual / np.maximum(off, 1e-12)))
    base = terms @ factors
    rest = np.log((seconds + 0.1 * scale) / (base + 0.1 * scale))
    limit = 3 * max(0.02, float(np.median(np.abs(rest))))
    return Staircase(factors, widths, np.clip(rest, -limit, limit))


def _terms(widths: Array) -> Array:
    """(n, terms): what time may be a sum of, from (n, 2) channels read and made."""
    reads, makes = widths[:, 0], widths[:, 1]
    read = [np.ceil(reads / b) * b for b in READ_BLOCKS]
    made = [np.ceil(makes / b) * b for b in MADE_BLOCKS]
    columns = [np.ones(len(widths)), *read, *made, *(r * m for r in read for m in made)]
    for width in (reads, makes):
        for vector in VECTORS:
            odd = (np.mod(width, vector) > 0).astype(np.float64)
            columns += [odd, odd * width, odd * reads * makes]
    return np.stack(columns, 1)


def _nonnegative(a: Array, b: Array) -> Array:
    """x >= 0 with the least |a x - b|^2 + a price for each x_i: an active set, on columns of length 1."""
    length = np.maximum(np.linalg.norm(a, axis=0), 1e-30)
    unit = a / length
    # Columns are nearly alike (blocks of 4 and 8 at aligned widths), so a little is added to the diagonal.
    gram = unit.T @ unit + _RIDGE * np.eye(a.shape[1])
    target = unit.T @ b - THRIFT * math.sqrt(len(b))
    x, active = np.zeros(a.shape[1]), np.zeros(a.shape[1], bool)
    for _ in range(_STEPS * a.shape[1]):
        slope = np.where(active, -np.inf, target - gram @ x)
        best = int(slope.argmax())
        if slope[best] <= 1e-9 * max(1.0, float(np.abs(target).max())):
            break
        active[best] = True
        x = _inside(gram, target, x, active)
    return x / length


def _inside(gram: Array, target: Array, x: Array, active: npt.NDArray[np.bool_]) -> Array:
    """The least squares of the active entries; those that would go below 0 leave the set (which is changed)."""
    while active.any():
        wish = np.zeros_like(x)
        wish[active] = np.linalg.solve(gram[np.ix_(active, active)], target[active])
        low = active & (wish <= 0)
        if not low.any():
            return wish
        step = float((x[low] / np.maximum(x[low] - wish[low], 1e-300)).min())
        x = x + min(1.0, step) * (wish - x)
        active &= x > 1e-15
        x = np.where(active, x, 0.0)
    return np.zeros_like(x)
