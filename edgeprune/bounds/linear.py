"""Bounds of linear maps in center and radius: convolutions, linear layers, averages; and of maxima over windows.

Over a center c and a radius r, a weight W gives W c and |W| r. Where an image is a hull over its positions, a
convolution is the matrix of its weights summed over the taps (the radius: of their magnitudes).
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from edgeprune.bounds.interval import Interval, Value, from_center, slack
from edgeprune.models import Call

WEIGHTED = ("conv1d", "conv2d", "conv3d", "linear")
MAXIMA = ("max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices", "max_pool3d_with_indices")
_AVERAGES = ("avg_pool1d", "avg_pool2d", "avg_pool3d")
LINEAR_POOLS = (
    *_AVERAGES,
    *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
    *("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d"),
)


@dataclass(frozen=True)
class ChannelMatrices:
    """A layer as matrices (groups, outputs, inputs) between channels.

    total: sums of the weights over the taps. absolute: sums of their magnitudes. padded: whether taps at the border
    read zeros. terms: products in one sum.
    """

    total: Tensor
    absolute: Tensor
    padded: bool
    terms: int


def channel_matrices(call: Call, weight: Tensor) -> ChannelMatrices:
    """For a convolution or a linear layer."""
    if call.op == "linear":
        return ChannelMatrices(weight[None], weight.abs()[None], False, weight.shape[1])
    split = weight.reshape(int(call.arg("groups")), -1, *weight.shape[1:])
    padding = call.arg("padding")
    padded = padding == "same" if isinstance(padding, str) else any(padding)
    over = tuple(range(3, split.ndim))
    return ChannelMatrices(split.sum(over), split.abs().sum(over), bool(padded), weight[0].numel())


def weighted(call: Call, weight: Tensor, x: Value) -> Interval:
    """Bounds of a convolution or a linear layer without its bias over everything in x."""
    if call.op == "linear":
        return _through(x.full([-1]), weight, functional.linear, weight.shape[1])
    spatial = weight.ndim - 2
    axes = range(x.rank - spatial, x.rank)
    channels = x.rank - spatial - 1
    if any(x.collapsed(a) for a in axes) and all(x.kept[a] == 1 for a in axes):
        return _collapsed(call, weight, x.full([channels]))
    return _through(x.full([channels, *axes]), weight, lambda v, w: _convolve(call, w, v), weight[0].numel())


def _through(x: Interval, weight: Tensor, fn: Callable[[Tensor, Tensor], Tensor], terms: int) -> Interval:
    center, radius = x.ball(terms)
    return from_center(fn(center, weight), fn(radius, weight.abs()))


def _convolve(call: Call, weight: Tensor, x: Tensor) -> Tensor:
    """The convolution of (B, 1, C, ...) with the first two axes as its batch."""
    flat = x.reshape(-1, *x.shape[-(weight.ndim - 1) :])
    with warnings.catch_warnings():
        # torch warns that an even kernel with padding "same" costs a copy.
        warnings.simplefilter("ignore", UserWarning)
        out = call.target(flat, weight, None, *call.args[3:])
    return out.reshape(*x.shape[: -(weight.ndim - 1)], *out.shape[1:])


def _collapsed(call: Call, weight: Tensor, x: Interval) -> Interval:
    spatial = weight.ndim - 2
    shape = x.lo.shape[: x.lo.ndim - spatial]
    flat = Interval(x.lo.reshape(-1, shape[-1]), x.hi.reshape(-1, shape[-1]))
    layer = channel_matrices(call, weight)
    center, radius = (flat.hull(0.0) if layer.padded else flat).ball(layer.terms)
    found = from_center(_mix(center, layer.total), _mix(radius, layer.absolute))
    size = (*shape[:-1], -1, *(1,) * spatial)
    return Interval(found.lo.reshape(size), found.hi.reshape(size))


def _mix(x: Tensor, matrix: Tensor) -> Tensor:
    """(N, groups · inputs) times (groups, outputs, inputs), each group separately."""
    if matrix.shape[0] == 1:
        return x @ matrix[0].T
    split = x.reshape(-1, matrix.shape[0], matrix.shape[2])
    if matrix.shape[2] == 1:
        return (split * matrix[:, :, 0]).flatten(1)
    return torch.einsum("bgi,goi->bgo", split, matrix).flatten(1)


def pooled(call: Call, x: Value) -> Interval:
    """Bounds of one of MAXIMA or LINEAR_POOLS over everything in x; of a tuple, the first.

    x may also be a change: a maximum changes by at least the smallest and at most the largest change in its window; all
    others are linear.
    """
    spatial = next(int(c) for c in call.op if c in "123")
    axes = range(x.rank - spatial, x.rank)
    flat = any(x.collapsed(a) for a in axes) and all(x.kept[a] == 1 for a in axes)
    if flat and ("divisor_override" not in call.names or call.arg("divisor_override") is None):
        padded = call.op in _AVERAGES and any(call.arg("padding")) and call.arg("count_include_pad")
        return x.bounds.hull(0.0) if padded else x.bounds

    def run(v: Tensor) -> Tensor:
        # The axes before the channels are the batch.
        out: Any = call.target(v.reshape(-1, *v.shape[-spatial - 1 :]), *call.args[1:])
        out = out[0] if isinstance(out, tuple) else out
        return out.reshape(*v.shape[: -spatial - 1], *out.shape[1:])

    inside = x.full(list(axes))
    if call.op in MAXIMA:
        return Interval(run(inside.lo), run(inside.hi))
    return _widened(inside, run, prod(x.shape[a] for a in axes))


def pooled_change(call: Call, change: Value) -> Interval:
    """Bounds of the change of a maximum over windows."""
    spread = pooled(call, Value(-change.bounds, change.shape))
    return Interval(-spread.hi, pooled(call, change).hi)


def reduced(call: Call, x: Value) -> Interval:
    """Bounds of a mean or a sum."""
    dims = call.arg("dim") if "dim" in call.names else None
    keep = bool(call.arg("keepdim")) if "keepdim" in call.names else False
    axes = sorted({d % x.rank for d in ((dims,) if isinstance(dims, int) else dims or range(x.rank))})
    over, terms = [a + 1 for a in axes], prod(x.shape[a] for a in axes)
    if call.op == "mean":
        return _widened(x.bounds, lambda v: v.mean(over, keep), terms)
    count = prod(x.shape[a] for a in axes if x.collapsed(a))
    return _widened(x.bounds, lambda v: v.sum(over, keep) * count, terms)


def _widened(x: Interval, fn: Callable[[Tensor], Tensor], terms: int) -> Interval:
    wide = slack(x.lo.dtype, terms) * fn(x.magnitude)
    return Interval(fn(x.lo) - wide, fn(x.hi) + wide)
