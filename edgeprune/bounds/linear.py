"""Bounds of linear maps in center and radius: convolutions and their transposes, linear layers, products of matrices.

Over a center c and a radius r, a weight W gives W c and |W| r. Where an image is a hull over its positions, a
convolution is the matrix of its weights summed over the taps (the radius: of their magnitudes).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product as combinations
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from edgeprune.bounds.interval import Interval, NoRule, Value, around, constant, slack
from edgeprune.models import Call

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
WEIGHTED = (*CONVOLUTIONS, *TRANSPOSED, "linear")


@dataclass(frozen=True)
class Taps:
    """A layer as matrices between channels: (groups, outputs, inputs) of each group.

    total: sums of the weights over the taps. absolute: sums of their magnitudes. partial: whether some outputs miss
    some taps (at the border of a padded image), so that a tap may also see a zero.
    """

    total: Tensor
    absolute: Tensor
    partial: bool
    terms: int


def weighted(call: Call, weight: Tensor, x: Value) -> Interval:
    """Bounds of a convolution or a linear layer without its bias over everything in x."""
    if call.op == "linear":
        inside = x.full([-1])
        return _through(inside, weight, functional.linear, weight.shape[1])
    spatial = weight.ndim - 2
    axes = range(x.rank - spatial, x.rank)
    channels = x.rank - spatial - 1
    if any(x.collapsed(a) for a in axes) and all(x.kept[a] == 1 for a in axes):
        return _collapsed(call, weight, x.full([channels]))
    terms = weight.numel() // weight.shape[1 if call.op in TRANSPOSED else 0]
    inside = x.full([channels, *axes])
    return _through(inside, weight, lambda v, w: _convolve(call, w, v), terms)


def taps(call: Call, weight: Tensor) -> tuple[Taps, ...]:
    """The matrices of a layer; several for a strided transpose, whose outputs take turns in which taps they see."""
    if call.op == "linear":
        return (Taps(weight[None], weight.abs()[None], False, weight.shape[1]),)
    groups, spatial = int(call.arg("groups")), tuple(range(2, weight.ndim))
    if call.op in CONVOLUTIONS:
        split = weight.reshape(groups, -1, *weight.shape[1:])
        padding = call.arg("padding")
        padded = padding == "same" if isinstance(padding, str) else any(padding)
        partial = padded and prod(weight.shape[2:]) > 0
        over = tuple(a + 1 for a in spatial)
        return (Taps(split.sum(over), split.abs().sum(over), bool(partial), weight[0].numel()),)
    return tuple(_phases(call, weight, groups))


def matrices(a: Value | Tensor, b: Value | Tensor) -> Interval:
    """Bounds of the matrix product of two tensors of the network, at least one of them with bounds."""
    first, second = _valued(a), _valued(b)
    if first.rank < 2 or second.rank < 2:
        raise NoRule(f"a product of tensors with {first.rank} and {second.rank} axes")
    rank, terms = max(first.rank, second.rank), first.shape[-1]
    if first.kept[-1] == second.kept[-2] == 1:
        # Both are hulls over what is summed: every term of the sum has the same bounds.
        out = bilinear(torch.matmul, first.ranked(rank), second.ranked(rank), terms)
        return out.scaled(terms)
    left = Value(first.full([-1]), first.shape).ranked(rank)
    right = Value(second.full([-2]), second.shape).ranked(rank)
    return bilinear(torch.matmul, left, right, terms)


def einsum(equation: str, a: Value | Tensor, b: Value | Tensor) -> Interval:
    """Bounds of an Einstein sum over two tensors of the network."""
    operands = (_valued(a), _valued(b))
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    if not arrow or "." in equation:
        raise NoRule(f"the Einstein sum {equation!r}")
    letters = inputs.split(",")
    axes = [
        (letter, v, i) for v, word in zip(operands, letters, strict=True) for i, letter in enumerate(word)
    ]
    sizes = {letter: v.shape[i] for letter, v, i in axes}
    # Over an axis that is a hull in both, every term of a sum has the same bounds.
    spread = {letter for letter, v, i in axes if v.kept[i] > 1}
    inside = [
        v.full([i for i, x in enumerate(w) if x in spread]) for v, w in zip(operands, letters, strict=True)
    ]
    batch = max(v.lo.shape[0] for v in inside)
    left, right = (Interval(*(end.expand(batch, *end.shape[1:]) for end in (v.lo, v.hi))) for v in inside)
    summed = [letter for letter in sizes if letter not in output]
    terms = prod(sizes[letter] for letter in summed)
    out = bilinear(torch.vmap(lambda x, y: torch.einsum(equation, x, y)), left, right, terms)
    return out.scaled(prod(sizes[letter] for letter in summed if letter not in spread))


def bilinear(fn: Callable[[Tensor, Tensor], Tensor], a: Interval, b: Interval, terms: int) -> Interval:
    """Bounds of a bilinear map with coefficients 0 and 1: A b and its radius |A| rb + ra (|B| + rb)."""
    (left, left_radius), (right, right_radius) = a.ball(terms), (b.center, b.radius)
    radius = fn(left_radius, right.abs() + right_radius)
    if bool(right_radius.any()):
        radius = radius + fn(left.abs(), right_radius)
    return around(fn(left, right), radius)


def _through(x: Interval, weight: Tensor, fn: Callable[[Tensor, Tensor], Tensor], terms: int) -> Interval:
    center, radius = x.ball(terms)
    return around(fn(center, weight), fn(radius, weight.abs()))


def _convolve(call: Call, weight: Tensor, x: Tensor) -> Tensor:
    """The layer as torch runs it, on (B, 1, C, ...): the two axes in front are one batch to it."""
    flat = x.reshape(-1, *x.shape[-(weight.ndim - 1) :])
    with warnings.catch_warnings():
        # That an even kernel with padding "same" costs a copy is not the user's business here.
        warnings.simplefilter("ignore", UserWarning)
        out = call.target(flat, weight, None, *call.args[3:])
    return out.reshape(*x.shape[: -(weight.ndim - 1)], *out.shape[1:])


def _collapsed(call: Call, weight: Tensor, x: Interval) -> Interval:
    spatial = weight.ndim - 2
    shape = x.lo.shape[: x.lo.ndim - spatial]
    flat = Interval(x.lo.reshape(-1, shape[-1]), x.hi.reshape(-1, shape[-1]))
    found: Interval | None = None
    for part in taps(call, weight):
        center, radius = (flat.hull(0.0) if part.partial else flat).ball(part.terms)
        out = around(_mix(center, part.total), _mix(radius, part.absolute))
        found = out if found is None else found.hull(out)
    assert found is not None
    size = (*shape[:-1], -1, *(1,) * spatial)
    return Interval(found.lo.reshape(size), found.hi.reshape(size))


def _mix(x: Tensor, matrix: Tensor) -> Tensor:
    """(N, groups · inputs) times (groups, outputs, inputs), group by group."""
    if matrix.shape[0] == 1:
        return x @ matrix[0].T
    split = x.reshape(-1, matrix.shape[0], matrix.shape[2])
    if matrix.shape[2] == 1:
        return (split * matrix[:, :, 0]).flatten(1)
    return torch.einsum("bgi,goi->bgo", split, matrix).flatten(1)


def _phases(call: Call, weight: Tensor, groups: int) -> list[Taps]:
    kernel = weight.shape[2:]
    settings = zip(
        kernel,
        *(_each(call.arg(n), len(kernel)) for n in ("stride", "padding", "output_padding", "dilation")),
        strict=True,
    )
    partial = False
    turns: list[list[list[int]]] = []
    for size, stride, padding, extra, dilation in settings:
        partial = partial or size > stride or padding > 0 or extra > 0 or dilation > 1
        turns.append([[t for t in range(size) if t * dilation % stride == turn] for turn in range(stride)])
    split = weight.reshape(groups, -1, *weight.shape[1:]).transpose(1, 2)
    over = tuple(range(3, split.ndim))
    found: list[Taps] = []
    for chosen in combinations(*turns):
        part = split
        for axis, indices in zip(over, chosen, strict=True):
            part = part.index_select(axis, torch.tensor(indices, dtype=torch.long))
        found.append(Taps(part.sum(over), part.abs().sum(over), partial, weight.numel() // weight.shape[1]))
    return found


def _each(setting: tuple[int, ...], count: int) -> tuple[int, ...]:
    return setting * count if len(setting) == 1 else setting


def _valued(operand: Value | Tensor) -> Value:
    return operand if isinstance(operand, Value) else constant(operand)


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
