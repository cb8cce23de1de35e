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

import torch
from torch import Tensor
from torch.nn import functional

from edgeprune.nn.bounds_interval import Interval, NoRule, Value, around, constant
from edgeprune.nn.tracing import Call

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
    """Bounds of a convolution or a linear layer without its bias over everything in x.

    Args:
        call: one of WEIGHTED. weight: of the dtype of x. x: what the layer reads.
    """
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
