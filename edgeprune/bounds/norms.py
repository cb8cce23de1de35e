"""Bounds of what relates many numbers to each other: normalizations, softmax, attention.

Normalizations: |x_i - mean| <= sqrt(n - 1) std for n numbers, always. std is a seminorm, so over a box it is within
the root mean square of the radii of what it is at the center. With s = sqrt(std^2 + eps) and y = (x - mean) / s,
dy_i = (dx_i - mean(dx) - y_i mean(y dx)) / s, and |mean(y dx)| <= rms(dx) because mean(y^2) <= 1.

Softmax: p_i grows with score i and falls with the others; dp_i = p_i (1 - p_i) (dx_i - a mean of the other dx).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod, sqrt

import torch
from torch import Tensor

from edgeprune.bounds.interval import Interval, NoRule, Value, around, rounded, slack
from edgeprune.models import Call

NORMS = ("group_norm", "layer_norm", "instance_norm", "rms_norm")
SOFTMAXES = ("softmax", "log_softmax", "_softmax", "_log_softmax", "_safe_softmax")


@dataclass(frozen=True)
class _Norm:
    """axes: normalized over, of bounds (B, ...). count: numbers in them. centered: their mean is taken away."""

    axes: tuple[int, ...]
    count: int
    eps: float
    centered: bool

    def largest(self) -> float:
        """What the magnitude of a normalized number never exceeds."""
        return sqrt(self.count - 1 if self.centered else self.count)


def normalized(call: Call, x: Value, weight: Tensor | None, bias: Tensor | None) -> Interval:
    """Bounds of one of NORMS over everything in x.

    Raises:
        NoRule: it uses other statistics than those of its input.
    """
    inside, norm = _arranged(call, x)
    out = _restored(call, _units(inside, norm))
    out = out if weight is None else out.scaled(_shaped(call, weight, out))
    if bias is None:
        return out
    shift = _shaped(call, bias, out)
    return out + Interval(shift, shift)


def normalized_change(call: Call, x: Value, change: Value, weight: Tensor | None) -> Interval:
    """Bounds of the change of one of NORMS when x changes by `change`.

    Raises:
        NoRule: as `normalized`.
    """
    moved = change.bounds
    reach = x.bounds + Interval(moved.lo.clamp(max=0.0), moved.hi.clamp(min=0.0))
    inside, norm = _arranged(call, Value(reach, x.shape))
    step, _ = _arranged(call, change)
    inverse = _inverse(inside, norm)
    length = (step.magnitude**2).mean(norm.axes, True).sqrt() * (1 + slack(moved.lo.dtype, norm.count))
    turn = _units(inside, norm).magnitude * length * inverse.hi
    straight = _deviations(step, norm) * inverse
    out = _restored(call, rounded(straight.lo - turn, straight.hi + turn, 4))
    return out if weight is None else out.scaled(_shaped(call, weight, out))


def softmax(call: Call, x: Value) -> Interval:
    """Bounds of a softmax, or of its logarithm, over everything in x."""
    out = _log_softmax(x.bounds, _axis(call, x), x.shape[_axis(call, x) - 1])
    if "log" in call.op:
        return out
    wide = slack(out.lo.dtype, 16)
    return Interval((out.lo.exp() * (1 - wide)).clamp(min=0.0), (out.hi.exp() * (1 + wide)).clamp(max=1.0))


def softmax_change(call: Call, x: Value | None, change: Value) -> Interval:
    """Bounds of the change of a softmax, or of its logarithm, when x changes by `change`."""
    moved, axis = change.bounds, _axis(call, change)
    out = Interval(moved.lo - moved.hi.amax(axis, True), moved.hi - moved.lo.amin(axis, True))
    out = rounded(out.lo, out.hi)
    if "log" in call.op:
        return out
    steep = torch.full_like(out.hi, 0.25)
    if x is not None:
        reach = x.bounds + Interval(moved.lo.clamp(max=0.0), moved.hi.clamp(min=0.0))
        share = _log_softmax(reach, axis, change.shape[axis - 1])
        low, high = share.lo.exp(), share.hi.exp()
        nearest = torch.full_like(low, 0.5).clamp(min=low, max=high)
        steep = (nearest * (1 - nearest) * (1 + slack(low.dtype, 16)) + slack(low.dtype, 4)).clamp(max=0.25)
    return rounded(steep * out.lo.clamp(max=0.0), steep * out.hi.clamp(min=0.0))


def attended(call: Call, value: Value) -> Interval:
    """Bounds of scaled dot-product attention: each answer is a mean of the values, with weights >= 0.

    Raises:
        NoRule: several heads share a value, or it drops some at random.
    """
    if call.arg("dropout_p") or call.arg("enable_gqa"):
        raise NoRule("it drops values at random, or shares them between heads")
    bounds = value.bounds
    wide = slack(bounds.lo.dtype, value.shape[-2]) * bounds.magnitude.amax(-2, True)
    out = Interval(bounds.lo.amin(-2, True) - wide, bounds.hi.amax(-2, True) + wide)
    # Where the mask shuts every key out, the answer is 0.
    return out if call.arg("attn_mask") is None else out.hull(0.0)


def _arranged(call: Call, x: Value) -> tuple[Interval, _Norm]:
    if call.op in ("layer_norm", "rms_norm"):
        given = call.arg("eps")
        eps = float(torch.finfo(torch.float32).eps if given is None else given)
        first = x.rank - len(call.arg("normalized_shape"))
        norm = _Norm(tuple(range(first + 1, x.rank + 1)), prod(x.shape[first:]), eps, call.op == "layer_norm")
        inside = x.bounds
    else:
        if call.op == "instance_norm" and not call.arg("use_input_stats"):
            raise NoRule("it uses running statistics")
        groups = int(call.arg("num_groups")) if call.op == "group_norm" else x.shape[1]
        inside = x.full([1])
        size = (*inside.lo.shape[:2], groups, -1, *inside.lo.shape[3:])
        inside = Interval(inside.lo.reshape(size), inside.hi.reshape(size))
        norm = _Norm(
            tuple(range(3, x.rank + 2)), prod(x.shape[1:]) // groups, float(call.arg("eps")), centered=True
        )
    if norm.eps <= 0:
        raise NoRule(f"its eps is {norm.eps:g}")
    return inside, norm


def _restored(call: Call, out: Interval) -> Interval:
    if call.op in ("layer_norm", "rms_norm"):
        return out
    return Interval(out.lo.flatten(2, 3), out.hi.flatten(2, 3))


def _shaped(call: Call, weight: Tensor, out: Interval) -> Tensor:
    if call.op in ("layer_norm", "rms_norm"):
        return weight
    return weight.reshape(-1, *(1,) * (out.lo.ndim - 3))


def _units(x: Interval, norm: _Norm) -> Interval:
    """The normalized numbers, before scale and shift."""
    limit = norm.largest() * (1 + slack(x.lo.dtype, norm.count))
    out = _deviations(x, norm) * _inverse(x, norm)
    return Interval(out.lo.clamp(-limit, limit), out.hi.clamp(-limit, limit))


def _deviations(x: Interval, norm: _Norm) -> Interval:
    """x_i - mean(x): coefficient 1 - 1/n for x_i, -1/n for each other."""
    center, radius = x.ball(0)
    error = slack(center.dtype, norm.count) * x.magnitude.amax(norm.axes, True)
    if norm.centered:
        center = center - center.mean(norm.axes, True)
        radius = radius * (1 - 2 / norm.count) + radius.mean(norm.axes, True)
    return around(center, radius.clamp(min=0.0) + error)


def _inverse(x: Interval, norm: _Norm) -> Interval:
    """1 / sqrt(std^2 + eps), or with the root mean square in the place of std."""
    center = x.center
    wide = slack(center.dtype, norm.count)
    error = wide * x.magnitude.amax(norm.axes, True)
    if norm.centered:
        center = center - center.mean(norm.axes, True)
    middle = (center**2).mean(norm.axes, True).sqrt()
    spread = (x.ball(0)[1] ** 2).mean(norm.axes, True).sqrt() * (1 + wide) + error
    low, high = (middle * (1 - wide) - spread).clamp(min=0.0), middle * (1 + wide) + spread
    return rounded(1 / (high**2 + norm.eps).sqrt(), 1 / (low**2 + norm.eps).sqrt(), 8)


def _axis(call: Call, x: Value) -> int:
    return int(call.arg("dim")) % x.rank + 1


def _log_softmax(x: Interval, axis: int, count: int) -> Interval:
    """Each score at one end and all others at the other; `count` scores, also where one stands for all."""
    top = x.hi.amax(axis, True)
    low, high = x.lo - top, x.hi - top
    times = count // x.lo.shape[axis]
    least, most = low.exp(), high.exp()
    # What is left of a sum without its own term has the rounding error of the whole sum, at most `count`.
    error = slack(x.lo.dtype, count) * 8 * most.sum(axis, True) * times
    others_least = (least.sum(axis, True) * times - least - error).clamp(min=0.0)
    others_most = (most.sum(axis, True) * times - most).clamp(min=0.0) + error
    wide = slack(x.lo.dtype, 16) * (1 + low.abs() + x.magnitude)
    return Interval(
        low - (least + others_most).log() - wide, (high - (most + others_least).log() + wide).clamp(max=0.0)
    )
