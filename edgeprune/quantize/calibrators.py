"""Ranges for quantizing activations, chosen from their histograms by four calibrators.

minmax      all that was seen.
percentile  all but one value in ten thousand, shared out on both ends.
entropy     the clipping after which the 8-bit histogram has the least Kullback-Leibler divergence from the true one
            (as in S. Migacz, 8-bit Inference with TensorRT, GTC 2017; here also for ranges that begin elsewhere
            than at zero).
mse         the clipping of both ends that rounds and clips with the least squared error.

Each range contains zero, which 8 bits must hold exactly: it is what paddings are made of.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeprune.errors import UsageError
from edgeprune.quantities import suggest
from edgeprune.quantize.observers import BINS, Activations, Seen

Array = npt.NDArray[Any]
Range = tuple[float, float]
CALIBRATORS = ("minmax", "percentile", "entropy", "mse")
# What a percentile range leaves out, as a share of all values.
LEFT_OUT = 1e-4
# How many clippings are tried on each end.
CANDIDATES = 32
ENTROPY_CANDIDATES = 128
# A tensor that never leaves zero has no range of its own; one this small would give a scale that float32 can't hold.
_NOTHING = 1e-30
_SMALL = 1e-4


def ranges(seen: Activations, calibrator: str, *, symmetric: bool) -> dict[str, Range]:
    """The range of each activation.

    Args:
        symmetric: ranges (-a, a), for signed values with zero point 0; else each end for itself.

    Returns:
        Name -> (low, high), low <= 0 <= high, low < high. A tensor that is zero throughout gets a unit range.
    """
    choose = _CHOOSERS.get(calibrator)
    if choose is None:
        raise UsageError(
            f"quantize.calibrator {calibrator!r} is not one of {', '.join(CALIBRATORS)}",
            suggest(calibrator, CALIBRATORS),
        )
    return {name: _range(item, choose, symmetric) for name, item in seen.items()}


def grid(low: float, high: float, *, symmetric: bool) -> tuple[float, int]:
    """Scale and zero point of the 8-bit grid over a range: a value is scale * (q - zero point).

    q is an integer in [0, 255]; symmetric in [-128, 127], with zero point 0, and -low == high is 127 steps.
    """
    if symmetric:
        return max(-low, high) / 127, 0
    scale = (high - low) / 255
    return scale, int(np.clip(round(-low / scale), 0, 255))


def _range(seen: Seen, choose: Callable[[Seen, bool], Range], symmetric: bool) -> Range:
    if max(abs(seen.low), abs(seen.high)) < _NOTHING:
        return (-1.0, 1.0) if symmetric else (0.0, 1.0)
    low, high = choose(seen, symmetric)
    # What never came cannot be clipped, nor can a bin's edge lie further out than any value.
    low, high = max(min(low, 0.0), min(seen.low, 0.0)), min(max(high, 0.0), max(seen.high, 0.0))
    if low == high:
        low, high = _minmax(seen, symmetric=False)
    if symmetric:
        most = max(-low, high)
        return -most, most
    return low, high


def _minmax(seen: Seen, symmetric: bool) -> Range:
    return min(seen.low, 0.0), max(seen.high, 0.0)


def _percentile(seen: Seen, symmetric: bool) -> Range:
    if symmetric:
        edges, counts = _folded(seen)
        most = _quantile(edges, counts, 1 - LEFT_OUT)
        return -most, most
    edges = _edges(seen)
    share = LEFT_OUT if seen.low >= 0 or seen.high <= 0 else LEFT_OUT / 2
    return _quantile(edges, seen.counts, share), _quantile(edges, seen.counts, 1 - share)


def _quantile(edges: Array, counts: Array, share: float) -> float:
    below = np.concatenate([[0], np.cumsum(counts)])
    return float(np.interp(share * below[-1], below, edges))


def _entropy(seen: Seen, symmetric: bool) -> Range:
    """Scan how much is kept: of the magnitudes if symmetric, else of both ends alike."""
    if symmetric:
        edges, counts = _folded(seen)
        levels = 128
    else:
        edges, counts = _edges(seen), seen.counts
        levels = 256
    zero = int(np.searchsorted(edges, 0.0))
    if zero + 1 < len(counts):
        # Every grid holds zero exactly, however many there are behind a ReLU: its bin must not ask for fine steps.
        counts = counts.copy()
        counts[zero] = counts[zero + 1]
    most = max(zero, len(counts) - zero)
    # With fewer bins than levels nothing is merged, and nothing can be told.
    fewest = min(levels, most)
    tried = np.unique(np.linspace(fewest, most, ENTROPY_CANDIDATES).round().astype(int))
    slices = [(max(0, zero - kept), min(len(counts), zero + kept)) for kept in tried]
    # The widest of equals: it clips least.
    best = min(reversed(slices), key=lambda s: divergence(counts, s[0], s[1], levels))
    low, high = float(edges[best[0]]), float(edges[best[1]])
    return (-high, high) if symmetric else (low, high)


def divergence(counts: Array, first: int, last: int, levels: int) -> float:
    """Kullback-Leibler divergence of an 8-bit histogram from the true one, in nats.

    The true one, P: bins [first, last), what lies outside added to the bins at the ends. The 8-bit one, Q: bins
    [first, last) merged into `levels` equal runs, each run's sum spread evenly over those of its bins that P has
    anything in. Both are normalized; where Q is zero and P is not, Q is taken as a ten-thousandth.
    """
    inside = counts[first:last].astype(np.float64)
    p = inside.copy()
    p[0] += counts[:first].sum()
    p[-1] += counts[last:].sum()
    run = np.arange(len(inside)) * levels // len(inside)
    sums = np.bincount(run, inside, minlength=levels)
    filled = np.bincount(run, p > 0, minlength=levels)
    q = np.where(p > 0, sums[run] / np.maximum(filled[run], 1), 0.0)
    p, q = p / p.sum(), q / max(q.sum(), 1.0)
    there = p > 0
    return float(np.sum(p[there] * np.log(p[there] / np.maximum(q[there], _SMALL * p[there]))))


def _mse(seen: Seen, symmetric: bool) -> Range:
    if symmetric:
        edges, counts = _folded(seen)
        most = max(-seen.low, seen.high)
        tried = [(-most * share, most * share) for share in _shares()]
    else:
        edges, counts = _edges(seen), seen.counts
        low, high = _minmax(seen, symmetric=False)
        lows = [low * share for share in _shares()] if low < 0 else [0.0]
        highs = [high * share for share in _shares()] if high > 0 else [0.0]
        tried = [(a, b) for a in lows for b in highs]
    filled = counts > 0
    centres, weights = ((edges[:-1] + edges[1:]) / 2)[filled], counts[filled] / counts.sum()
    errors = [squared_error(centres, weights, bounds, symmetric=symmetric) for bounds in tried]
    return tried[int(np.argmin(errors))]


def squared_error(centres: Array, weights: Array, bounds: Range, *, symmetric: bool) -> float:
    """Mean squared difference of values (B,), of weights (B,) that add up to 1, from their 8-bit forms."""
    scale, zero = grid(*bounds, symmetric=symmetric)
    least, most = (-128, 127) if symmetric else (0, 255)
    rounded = (np.clip(np.rint(centres / scale) + zero, least, most) - zero) * scale
    return float(weights @ np.square(centres - rounded))


def _shares() -> Array:
    # From the widest down, so that the widest of equals is taken.
    return np.arange(CANDIDATES, 0, -1) / CANDIDATES


def _edges(seen: Seen) -> Array:
    return np.linspace(seen.edge_low, seen.edge_high, len(seen.counts) + 1)


def _folded(seen: Seen) -> tuple[Array, Array]:
    edges = _edges(seen)
    width = (seen.edge_high - seen.edge_low) / len(seen.counts)
    middle = (edges[:-1] + edges[1:]) / 2
    place = np.floor(np.abs(middle) / width).astype(np.int64)
    # Values that lie together, far from zero, have fine bins; all the way from zero there would be too many of them.
    coarser = math.ceil((int(place.max()) + 1) / BINS)
    place, width = place // coarser, width * coarser
    counts = np.bincount(place, seen.counts).astype(np.int64)
    return np.arange(len(counts) + 1) * width, counts


_CHOOSERS: dict[str, Callable[[Seen, bool], Range]] = {
    "minmax": _minmax,
    "percentile": _percentile,
    "entropy": _entropy,
    "mse": _mse,
}
