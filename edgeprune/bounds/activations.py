"""Activation functions: bounds of their values and of their changes, from their extrema and slopes.

Over [lo, hi] the extremes of a function are at the ends and at its extrema inside. f(x + d) - f(x) is d times a slope
in between (mean value theorem), and slopes have their extremes at the ends and at their own extrema inside. For clamps
(ReLU and its relatives) the extremes of f(x + d) - f(x) are exact.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from edgeprune.bounds.interval import Interval, NoRule, rounded, slack
from edgeprune.models import Call

_ROUNDINGS = 16


@dataclass(frozen=True)
class Activation:
    """A function R -> R.

    extrema: positions of local extrema. slope: the derivative.
    slope_extrema: positions of its extrema, or of its jumps with the slopes on both sides.
    clamp, leak: f(x) = leak x + (1 - leak) clamp(x, *clamp).
    cancels: the rounding error is relative to x, not only to f(x).
    """

    extrema: tuple[float, ...] = ()
    slope: Callable[[Tensor], Tensor] | None = None
    slope_extrema: tuple[tuple[float, tuple[float, ...]], ...] = ()
    clamp: tuple[float, float] | None = None
    leak: float = 0.0
    cancels: bool = False


def activation(call: Call) -> Activation | None:
    """The elementwise function of an operator, if it is known."""
    make = _ACTIVATIONS.get(call.op)
    return make(call) if make else None


def applied(call: Call, x: Tensor) -> Tensor:
    """The function itself, with the settings of the call."""
    return call.run((x, *call.args[1:]))


def values(call: Call, function: Activation, x: Interval) -> Interval:
    """Bounds of f over x, exact but for rounding."""
    first, last = applied(call, x.lo), applied(call, x.hi)
    if function.clamp == (0.0, math.inf) and not function.leak:
        return Interval(first, last)
    lo, hi = torch.minimum(first, last), torch.maximum(first, last)
    for extremum in function.extrema:
        inside = (x.lo <= extremum) & (x.hi >= extremum)
        there = applied(call, torch.full_like(lo, extremum))
        lo = torch.where(inside, torch.minimum(lo, there), lo)
        hi = torch.where(inside, torch.maximum(hi, there), hi)
    wide = slack(lo.dtype, _ROUNDINGS) * (x.magnitude if function.cancels else 0.0)
    return rounded(lo - wide, hi + wide, _ROUNDINGS)


def changes(function: Activation, change: Interval, x: Interval) -> Interval:
    """Bounds of f(x + d) - f(x), d in `change`."""
    if function.clamp is None:
        return change * _slopes(function, change, x)
    passed = _clamped(change, x, *function.clamp)
    return change.scaled(function.leak) + passed.scaled(1 - function.leak) if function.leak else passed


def _clamped(change: Interval, x: Interval, low: float, high: float) -> Interval:
    """Exact bounds of clamp(x + d) - clamp(x), d in `change`; ReLU is the clamp to [0, inf).

    It grows with d, so the largest is at the largest d and the smallest at the smallest. Its magnitude is the length
    of [x, x + d] inside [low, high]; as x grows, that rises, stays and falls. So the longest is where x is nearest to
    where it stays, and the shortest is at an end of x.
    """
    if (low, high) == (0.0, math.inf):
        return _rectified(change, x)
    longest, shortest = _longest(change.hi, x, low, high), _shortest(change.hi, x, low, high)
    hi = torch.where(change.hi >= 0, longest, -shortest)
    longest, shortest = _longest(change.lo, x, low, high), _shortest(change.lo, x, low, high)
    return Interval(torch.where(change.lo <= 0, -longest, shortest), hi)


def _rectified(change: Interval, x: Interval) -> Interval:
    """`_clamped` for ReLU, in closed form: what is left of d >= 0 above 0, and of d < 0 above -x."""
    wide = slack(change.lo.dtype, 1)
    risen = torch.minimum((change.hi + x.hi.clamp(max=0.0)).clamp(min=0.0) * (1 + wide), change.hi)
    fallen = torch.maximum(change.hi, -x.lo.clamp(min=0.0))
    hi = torch.where(change.hi >= 0, risen, fallen)
    risen = (change.lo + x.lo.clamp(max=0.0)).clamp(min=0.0) * (1 - wide)
    return Interval(torch.where(change.lo >= 0, risen, torch.maximum(change.lo, -x.hi.clamp(min=0.0))), hi)


def _longest(change: Tensor, x: Interval, low: float, high: float) -> Tensor:
    size = change.abs()
    # Where [x, x + d] starts to lie inside as far as it can; for d < 0, x is its upper end.
    stays = (high - size).clamp(max=low) + (-change).clamp(min=0.0)
    length, error = _length(torch.minimum(torch.maximum(stays, x.lo), x.hi), change, low, high)
    return torch.minimum(length + error, size)


def _shortest(change: Tensor, x: Interval, low: float, high: float) -> Tensor:
    ends = [_length(end, change, low, high) for end in (x.lo, x.hi)]
    return torch.minimum(*(length - error for length, error in ends)).clamp(min=0.0)


def _length(x: Tensor, change: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """The length of [x, x + d] inside [low, high], and the rounding error in it; d as it is where all is inside."""
    after, wide = x + change, slack(x.dtype, 2)
    # The limits are rounded to the dtype, too.
    lowest = low + wide * abs(low) if low > -math.inf else low
    highest = high - wide * abs(high) if high < math.inf else high
    inside = (x >= lowest) & (x <= highest) & (after > lowest) & (after < highest)
    first, last = x.clamp(low, high), after.clamp(low, high)
    error = wide * (first.abs() + last.abs())
    zero = torch.zeros_like(error)
    return torch.where(inside, change.abs(), (last - first).abs()), torch.where(inside, zero, error)


def _slopes(function: Activation, change: Interval, x: Interval) -> Interval:
    assert function.slope is not None
    low, high = x.lo + change.lo.clamp(max=0.0), x.hi + change.hi.clamp(min=0.0)
    ends = [function.slope(low), function.slope(high)]
    smallest, largest = torch.minimum(*ends), torch.maximum(*ends)
    for bend, sides in function.slope_extrema:
        inside = (low <= bend) & (high >= bend)
        near = sides or (float(function.slope(torch.tensor(bend, dtype=torch.float64))),)
        smallest = torch.where(inside, smallest.clamp(max=min(near)), smallest)
        largest = torch.where(inside, largest.clamp(min=max(near)), largest)
    wide = slack(change.lo.dtype, _ROUNDINGS) * (1 + smallest.abs() + largest.abs())
    return Interval(smallest - wide, largest + wide)


def _clamp(call: Call) -> Activation:
    limits = [call.arg(n) if n in call.names else None for n in ("min", "max")]
    if any(v is not None and not isinstance(v, (int, float)) for v in limits):
        raise NoRule("its limits are tensors")
    low, high = limits
    return Activation(clamp=(-math.inf if low is None else low, math.inf if high is None else high))


def _silu_slope(x: Tensor) -> Tensor:
    gate = torch.sigmoid(x)
    return gate * (1 + x * (1 - gate))


def _hardswish_slope(x: Tensor) -> Tensor:
    return torch.where(x < -3, 0.0, torch.where(x > 3, 1.0, (2 * x + 3) / 6)).to(x.dtype)


def _gelu(call: Call) -> Activation | None:
    if call.arg("approximate") == "tanh":
        return None
    bend = math.sqrt(2)

    def slope(x: Tensor) -> Tensor:
        bell = torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
        return (1 + torch.erf(x / math.sqrt(2))) / 2 + x * bell

    return Activation((-0.75179152469356445746,), slope, ((-bend, ()), (bend, ())), cancels=True)


_ACTIVATIONS: Mapping[str, Callable[[Call], Activation | None]] = {
    "relu": lambda _: Activation(clamp=(0.0, math.inf)),
    "relu6": lambda _: Activation(clamp=(0.0, 6.0)),
    "hardtanh": lambda c: Activation(clamp=(c.arg("min_val"), c.arg("max_val"))),
    **dict.fromkeys(("clamp", "clamp_min", "clamp_max"), _clamp),
    # Below 0 it falls where the slope there is negative.
    "leaky_relu": lambda c: Activation((0.0,), clamp=(0.0, math.inf), leak=float(c.arg("negative_slope"))),
    "sigmoid": lambda _: Activation(
        slope=lambda x: torch.sigmoid(x) * torch.sigmoid(-x), slope_extrema=((0.0, ()),)
    ),
    "hardsigmoid": lambda _: Activation(
        slope=lambda x: (x.abs() < 3).to(x.dtype) / 6,
        slope_extrema=((-3.0, (0.0, 1 / 6)), (3.0, (0.0, 1 / 6))),
        cancels=True,
    ),
    "tanh": lambda _: Activation(slope=lambda x: 1 - torch.tanh(x) ** 2, slope_extrema=((0.0, ()),)),
    "silu": lambda _: Activation(
        (-1.2784645427610737951,),
        _silu_slope,
        ((-2.3993572805154676678, ()), (2.3993572805154676678, ())),
        cancels=True,
    ),
    "hardswish": lambda _: Activation(
        (-1.5,), _hardswish_slope, ((-3.0, (-0.5, 0.0)), (3.0, (1.0, 1.5))), cancels=True
    ),
    "gelu": _gelu,
}
