"""Bounds of what gathers over axes: pooling, resampling, means, sums, maxima.

Over an axis that is a hull, a mean, a maximum or an interpolation stays inside the hull.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

from torch import Tensor

from edgeprune.nn.bounds_interval import Interval, NoRule, Value, slack
from edgeprune.nn.tracing import Call

MAX_POOLS = ("max_pool1d", "max_pool2d", "max_pool3d")
# These give the positions of the maxima too.
PLACED = ("max_pool2d_with_indices", "max_pool3d_with_indices")
PLACED_ADAPTIVE = ("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d")
AVERAGES = ("avg_pool1d", "avg_pool2d", "avg_pool3d")
ADAPTIVE = ("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d")
UPSAMPLED = (
    *("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d"),
    *("_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d"),
    *("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d"),
)
MAXIMA = (*MAX_POOLS, *PLACED, *PLACED_ADAPTIVE)
POOLS = (*MAXIMA, *AVERAGES, *ADAPTIVE, *UPSAMPLED)
REDUCTIONS = ("mean", "sum", "amax", "amin", "max", "min")
_DIMENSION = {"1": 1, "2": 2, "3": 3}


def pooled(call: Call, x: Value) -> Interval:
    """Bounds of one of POOLS over everything in x; of a tuple, the first.

    For a maximum, x may as well be a change: the maximum changes by no less than the least and no more than the
    largest change in its window. All others are linear.
    """
    spatial = next(_DIMENSION[c] for c in call.op if c in _DIMENSION)
    axes = range(x.rank - spatial, x.rank)
    flat = any(x.collapsed(a) for a in axes) and all(x.kept[a] == 1 for a in axes)
    if flat and ("divisor_override" not in call.names or call.arg("divisor_override") is None):
        padded = call.op in AVERAGES and any(call.arg("padding")) and call.arg("count_include_pad")
        return x.bounds.hull(0.0) if padded else x.bounds
    inside = x.full(list(axes))
    run = _runner(call, spatial)
    if call.op in MAXIMA:
        return Interval(run(inside.lo), run(inside.hi))
    return _widened(inside, run, prod(x.shape[a] for a in axes))


def pooled_change(call: Call, change: Value) -> Interval:
    """Bounds of the change of a maximum over windows, from those of the change of what it is taken over."""
    spread = pooled(call, Value(-change.bounds, change.shape))
    return Interval(-spread.hi, pooled(call, change).hi)


def reduced(call: Call, x: Value) -> Interval:
    """Bounds of one of REDUCTIONS; of a tuple, the first."""
    dims = call.arg("dim") if "dim" in call.names else None
    keep = bool(call.arg("keepdim")) if "keepdim" in call.names else False
    if "other" in call.names:
        raise NoRule("it compares two tensors")
    axes = sorted({d % x.rank for d in ((dims,) if isinstance(dims, int) else dims or range(x.rank))})
    over = [a + 1 for a in axes]
    if call.op in ("amax", "max"):
        return Interval(x.bounds.lo.amax(over, keep), x.bounds.hi.amax(over, keep))
    if call.op in ("amin", "min"):
        return Interval(x.bounds.lo.amin(over, keep), x.bounds.hi.amin(over, keep))
    count = prod(x.shape[a] for a in axes if x.collapsed(a))
    if call.op == "mean":
        return _widened(x.bounds, lambda v: v.mean(over, keep), prod(x.shape[a] for a in axes))
    return _widened(x.bounds, lambda v: v.sum(over, keep) * count, prod(x.shape[a] for a in axes))


def _runner(call: Call, spatial: int) -> Callable[[Tensor], Tensor]:
    """The operator on (B, 1, C, ...): the axes in front of the channels are one batch to it."""

    def run(x: Tensor) -> Tensor:
        flat = x.reshape(-1, *x.shape[-spatial - 1 :])
        out: Any = call.target(flat, *call.args[1:])
        out = out[0] if isinstance(out, tuple) else out
        return out.reshape(*x.shape[: -spatial - 1], *out.shape[1:])

    return run


def _widened(x: Interval, fn: Callable[[Tensor], Tensor], terms: int) -> Interval:
    """Both ends through a linear map without negative coefficients."""
    wide = slack(x.lo.dtype, terms) * fn(x.magnitude)
    return Interval(fn(x.lo) - wide, fn(x.hi) + wide)
