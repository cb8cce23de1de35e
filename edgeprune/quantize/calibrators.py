"""Ranges for quantizing activations, chosen from their histograms by four calibrators.

minmax      all observed values.
percentile  all but one value in ten thousand, shared by both ends.
entropy     the clipping after which the 8-bit histogram has the least Kullback-Leibler divergence from the true one
            (as in S. Migacz, 8-bit Inference with TensorRT, GTC 2017; here also for ranges that begin elsewhere
            than at zero).
mse         the clipping of both ends that rounds and clips with the least squared error.

Each range contains zero, which 8 bits must hold exactly: it is what paddings are made of.
"""

import math
from collections.abc import Callable

import numpy as np

from edgeprune.onnx_graph import Array
from edgeprune.quantize.observers import BINS, Activations, Seen

Range = tuple[float, float]
CALIBRATORS = ("minmax", "percentile", "entropy", "mse")
# The share of all values outside of a percentile range.
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
    choose = _CHOOSERS[calibrator]
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
    # The edge of a bin may lie outside of all values.
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
    edges, counts = _histogram(seen, symmetric)
    below = np.concatenate([[0], np.cumsum(counts)])

    def quantile(share: float) -> float:
        return float(np.interp(share * below[-1], below, edges))

    if symmetric:
        return -quantile(1 - LEFT_OUT), quantile(1 - LEFT_OUT)
    share = LEFT_OUT if seen.low >= 0 or seen.high <= 0 else LEFT_OUT / 2
    return quantile(share), quantile(1 - share)


def _entropy(seen: Seen, symmetric: bool) -> Range:
    """Scan how much is kept: of the magnitudes if symmetric, else of both ends alike."""
    edges, counts = _histogram(seen, symmetric)
    levels = 128 if symmetric else 256
    zero = int(np.searchsorted(edges, 0.0))
    if zero + 1 < len(counts):
        # Every grid holds zero exactly, however many zeros a ReLU makes: its bin must not ask for fine steps.
        counts = counts.copy()
        counts[zero] = counts[zero + 1]
    most = max(zero, len(counts) - zero)
    # With fewer bins than levels nothing is merged.
    tried = np.unique(np.linspace(min(levels, most), most, ENTROPY_CANDIDATES).round().astype(int))
    slices = [(max(0, zero - kept), min(len(counts), zero + kept)) for kept in tried]
    # The widest of equals: it clips least.
    best = min(reversed(slices), key=lambda s: divergence(counts, s[0], s[1], levels))
    low, high = float(edges[best[0]]), float(edges[best[1]])
    return (-high, high) if symmetric else (low, high)


def divergence(counts: Array, first: int, last: int, levels: int) -> float:
    """Kullback-Leibler divergence of an 8-bit histogram from the true one, in nats.

    The true one, P: bins [first, last), with the outer bins added to the bins at the ends. The 8-bit one, Q: bins
    [first, last) merged into `levels` equal runs, each run's sum spread evenly over those of its bins where P is not
    zero. Both are normalized; where Q is zero and P is not, Q is taken as a ten-thousandth of P.
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
    # From the widest down, so that the widest of equals is taken.
    shares = np.arange(CANDIDATES, 0, -1) / CANDIDATES
    edges, counts = _histogram(seen, symmetric)
    low, high = _minmax(seen, symmetric)
    if symmetric:
        tried = [(-share, share) for share in max(-low, high) * shares]
    else:
        lows, highs = (end * shares if end else [0.0] for end in (low, high))
        tried = [(a, b) for a in lows for b in highs]
    filled = counts > 0
    centres, weights = ((edges[:-1] + edges[1:]) / 2)[filled], counts[filled] / counts.sum()
    errors = [squared_error(centres, weights, bounds, symmetric=symmetric) for bounds in tried]
    low, high = tried[int(np.argmin(errors))]
    return float(low), float(high)


def squared_error(centres: Array, weights: Array, bounds: Range, *, symmetric: bool) -> float:
    """Mean squared difference of values (B,), of weights (B,) that sum to 1, from their 8-bit forms."""
    scale, zero = grid(*bounds, symmetric=symmetric)
    least, most = (-128, 127) if symmetric else (0, 255)
    rounded = (np.clip(np.rint(centres / scale) + zero, least, most) - zero) * scale
    return float(weights @ np.square(centres - rounded))


def _histogram(seen: Seen, symmetric: bool) -> tuple[Array, Array]:
    edges = np.linspace(seen.edge_low, seen.edge_high, len(seen.counts) + 1)
    if not symmetric:
        return edges, seen.counts
    width = (seen.edge_high - seen.edge_low) / len(seen.counts)
    place = np.floor(np.abs((edges[:-1] + edges[1:]) / 2) / width).astype(np.int64)
    # Values in a narrow range far from zero have fine bins, too many of which would fit from zero on.
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
