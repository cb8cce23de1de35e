"""Operators that move entries and compute nothing: views, permutations, slices, splits, concatenations, padding.

The same rule serves bounds of values and of changes. An axis that is a hull over its positions stays one where the
operator allows; where entries of it are told apart again, it is spread out first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from edgeprune.bounds.interval import Interval, NoRule, Value, constant, rounded
from edgeprune.models import Call

Moved = Value | tuple[Value, ...]
_Operand = Value | Tensor


def moved(call: Call, args: Sequence[Any]) -> Moved | None:
    """What becomes of the bounds; None when the operator computes something.

    Args:
        call: the operator. args: its arguments, with a `Value` or a constant tensor for each tensor.
    """
    if call.op in (*_SAME, *_CASTS, *_DROPOUTS):
        return _same(call, args)
    rule = _RULES.get(call.op)
    return rule(call, args) if rule else None


def _same(call: Call, args: Sequence[Any]) -> Value:
    cast = next((a for a in args if isinstance(a, torch.dtype)), torch.float32)
    if cast not in (torch.float32, torch.float64):
        raise NoRule(f"it rounds to {cast}")
    if call.op in _DROPOUTS and call.arg("train"):
        raise NoRule("it is random, although the network is in eval mode")
    return Value(_first(args).bounds, call.shape)


def _first(args: Sequence[Any]) -> Value:
    return _valued(args[0])


def _valued(operand: _Operand) -> Value:
    return operand if isinstance(operand, Value) else constant(operand)


def _both(x: Value, fn: Callable[[Tensor], Tensor]) -> Interval:
    return Interval(fn(x.bounds.lo), fn(x.bounds.hi))


def _view(call: Call, args: Sequence[Any]) -> Value:
    """Axes are regrouped; a group of axes that are hulls throughout stays one."""
    x = _first(args)
    spread: list[int] = []
    kept: list[int] = []
    for old, new in _groups(x.shape, call.shape):
        if all(x.kept[a] == 1 for a in old):
            kept += [1] * len(new)
        else:
            spread += old
            kept += [call.shape[a] for a in new]
    inside = x.full(spread)
    size = (inside.lo.shape[0], *kept)
    return Value(Interval(inside.lo.reshape(size), inside.hi.reshape(size)), call.shape)


def _groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Runs of axes that hold the same entries before and after a view, in order; axes of size 1 go where they fall."""
    found: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        first, second, before, after = i, j, 1, 1
        while (first, second) == (i, j) or before != after:
            if j == len(new) or (i < len(old) and before <= after):
                before *= old[i]
                i += 1
            else:
                after *= new[j]
                j += 1
        found.append((list(range(first, i)), list(range(second, j))))
    return found


def _permute(call: Call, args: Sequence[Any]) -> Value:
    x = _first(args)
    order = list(range(x.rank))
    if call.op == "permute":
        order = [d % x.rank for d in args[1]]
    elif x.rank > 1:
        first, second = (d % x.rank for d in (args[1:3] if call.op == "transpose" else (0, 1)))
        order[first], order[second] = second, first
    return Value(_both(x, lambda v: v.permute(0, *(d + 1 for d in order))), call.shape)


def _reshaped(call: Call, args: Sequence[Any]) -> Value:
    """squeeze and unsqueeze: axes of size 1 come and go, the others stay."""
    x = _first(args)
    kept = iter([k for k, size in zip(x.kept, x.shape, strict=True) if size != 1])
    size = (x.bounds.lo.shape[0], *(1 if s == 1 else next(kept) for s in call.shape))
    return Value(_both(x, lambda v: v.reshape(size)), call.shape)


def _expand(call: Call, args: Sequence[Any]) -> Value:
    return Value(_first(args).ranked(len(call.shape)), call.shape)


def _select(call: Call, args: Sequence[Any]) -> Value:
    x, axis, index = _first(args), args[1] % _first(args).rank, args[2]
    return Value(_both(x, lambda v: v.select(axis + 1, 0 if x.kept[axis] == 1 else index)), call.shape)


def _slice(call: Call, args: Sequence[Any]) -> Value:
    x = _first(args)
    axis = args[1] % x.rank
    if x.collapsed(axis):
        return Value(x.bounds, call.shape)
    picked = slice(*(args[2:5] if call.op == "slice" else (args[2], _end(x.shape[axis], *args[2:4]))))
    at = (slice(None),) * (axis + 1)
    return Value(_both(x, lambda v: v[(*at, picked)]), call.shape)


def _end(size: int, start: int, length: int) -> int:
    return start % size + length if start < 0 else start + length


def _split(call: Call, args: Sequence[Any]) -> tuple[Value, ...]:
    x = _first(args)
    axis = (args[-1] if call.op != "unbind" else args[1]) % x.rank
    size, total = args[1], x.shape[axis]
    if call.op == "unbind":
        gone = (*x.shape[:axis], *x.shape[axis + 1 :])
        picks = [0 if x.kept[axis] == 1 else i for i in range(total)]
        return tuple(Value(_both(x, lambda v, i=i: v.select(axis + 1, i)), gone) for i in picks)
    if call.op == "chunk":
        size = -(-total // size)
    sizes = list(size) if isinstance(size, tuple) else [min(size, total - s) for s in range(0, total, size)]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    shapes = [(*x.shape[:axis], s, *x.shape[axis + 1 :]) for s in sizes]
    if x.collapsed(axis):
        return tuple(Value(x.bounds, shape) for shape in shapes)
    return tuple(
        Value(_both(x, lambda v, b=begin, n=count: v.narrow(axis + 1, b, n)), shape)
        for begin, count, shape in zip(starts, sizes, shapes, strict=True)
    )


def _getitem(call: Call, args: Sequence[Any]) -> Value:
    if args[1] >= len(args[0]):
        raise NoRule("it takes the positions of maxima")
    return Value(args[0][args[1]].bounds, call.shape)


def _cat(call: Call, args: Sequence[Any]) -> Value:
    """Along an axis over which a part is a hull, all parts are: positions are told apart by no one from there on."""
    beside = [p for p in args[0] if isinstance(p, Value)]
    parts = [p if isinstance(p, Value) else shrunk(p, beside) for p in args[0]]
    axis = args[1] % len(call.shape)
    if call.op == "stack":
        shape = (*call.shape[:axis], 1, *call.shape[axis + 1 :])
        parts = [Value(_both(p, lambda v: v.unsqueeze(axis + 1)), shape) for p in parts]
    parts = [p for p in parts if p.rank == len(call.shape)]
    if any(p.collapsed(axis) and not torch.equal(p.bounds.lo, p.bounds.hi) for p in parts):
        low = reduce(torch.minimum, [p.bounds.lo.amin(axis + 1, True) for p in parts])
        high = reduce(torch.maximum, [p.bounds.hi.amax(axis + 1, True) for p in parts])
        return Value(Interval(low, high), call.shape)
    inside = [p.full([axis]) for p in parts]
    batch = max(v.lo.shape[0] for v in inside)
    size = [batch, *(max(v.lo.shape[a + 1] for v in inside) for a in range(len(call.shape)))]
    size[axis + 1] = -1
    ends = ([v.lo.expand(size) for v in inside], [v.hi.expand(size) for v in inside])
    return Value(Interval(*(torch.cat(e, axis + 1) for e in ends)), call.shape)


def shrunk(values: Tensor, beside: Sequence[Value]) -> Value:
    """A constant's value: a hull over the axes, counted from the last, over which what is beside it is one."""
    value = constant(values)
    axes = [
        -a
        for a in range(1, value.rank + 1)
        if any(a <= b.rank and b.collapsed(b.rank - a) for b in beside) and value.shape[-a] > 1
    ]
    if not axes:
        return value
    return Value(Interval(value.bounds.lo.amin(axes, True), value.bounds.hi.amax(axes, True)), value.shape)


def _turned(call: Call, args: Sequence[Any]) -> Value:
    """roll and flip: along an axis that is a hull there is nothing to turn."""
    x = _first(args)
    if call.op == "flip":
        dims = [d % x.rank for d in args[1] if not x.collapsed(d % x.rank)]
        return Value(_both(x, lambda v: v.flip([d + 1 for d in dims])), call.shape)
    if not args[2]:
        raise NoRule("it rolls over all axes at once")
    pairs = [(s, d % x.rank) for s, d in zip(args[1], args[2], strict=True) if not x.collapsed(d % x.rank)]
    shifts, dims = [s for s, _ in pairs], [d + 1 for _, d in pairs]
    return Value(_both(x, lambda v: v.roll(shifts, dims) if dims else v), call.shape)


def _pad(call: Call, args: Sequence[Any]) -> Moved:
    x, sides = _first(args), args[1]
    mode = args[2] if call.op == "pad" else "constant"
    fill = float(args[3 if call.op == "pad" else 2] or 0.0)
    axes = [x.rank - 1 - i // 2 for i in range(len(sides))]
    open_sides = [0 if x.collapsed(axis) else side for axis, side in zip(axes, sides, strict=True)]
    if mode != "constant":
        return _spread(call, args) if any(open_sides) else Value(x.bounds, call.shape)
    out = x.bounds
    if any(x.collapsed(axis) and side > 0 for axis, side in zip(axes, sides, strict=True)):
        out = out.hull(fill)
    pad = functional.pad
    return Value(
        Interval(pad(out.lo, open_sides, mode, fill), pad(out.hi, open_sides, mode, fill)), call.shape
    )


def _shuffle(call: Call, args: Sequence[Any]) -> Moved:
    """pixel_shuffle and its inverse: between channels and positions."""
    x, factor = _first(args), args[1]
    if not (x.collapsed(x.rank - 2) and x.collapsed(x.rank - 1)):
        return _spread(call, args)
    inside = x.full([-3])
    if call.op == "pixel_unshuffle":
        return Value(
            Interval(*(v.repeat_interleave(factor**2, -3) for v in (inside.lo, inside.hi))), call.shape
        )
    size = (*inside.lo.shape[:-3], -1, factor**2, 1, 1)
    return Value(Interval(inside.lo.reshape(size).amin(-3), inside.hi.reshape(size).amax(-3)), call.shape)


def _masked(call: Call, args: Sequence[Any]) -> Value:
    if isinstance(args[1], Value):
        raise NoRule("its mask depends on the input")
    out = _spread(call, args)
    return Value(rounded(out.bounds.lo, out.bounds.hi), call.shape) if args[2] else out


def _indexed(call: Call, args: Sequence[Any]) -> Moved:
    if any(isinstance(i, Value) for i in args[1]):
        raise NoRule("its index depends on the input")
    return _spread(call, args)


def _spread(call: Call, args: Sequence[Any]) -> Value:
    operands = {i: a.full() for i, a in enumerate(args) if isinstance(a, Value)}
    batch = max(v.lo.shape[0] for v in operands.values())

    def one(*tensors: Tensor) -> Any:
        given = list(args)
        for i, tensor in zip(operands, tensors, strict=True):
            given[i] = tensor
        return call.target(*given)

    ends = [
        torch.vmap(one)(*(end.expand(batch, *end.shape[1:]) for end in side))
        for side in ([v.lo for v in operands.values()], [v.hi for v in operands.values()])
    ]
    return Value(Interval(*ends), call.shape)


# What gives the tensor that it takes.
_SAME = ("alias", "clone", "contiguous", "detach", "lift_fresh_copy")
_CASTS = ("to", "_to_copy", "type_as")
_DROPOUTS = ("dropout", "feature_dropout", "alpha_dropout")
_RULES: Mapping[str, Callable[[Call, Sequence[Any]], Moved]] = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_copy"), _view),
    **dict.fromkeys(("permute", "transpose", "t"), _permute),
    **dict.fromkeys(("squeeze", "unsqueeze"), _reshaped),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _expand),
    **dict.fromkeys(("slice", "narrow"), _slice),
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "unbind"), _split),
    **dict.fromkeys(("cat", "concat", "stack"), _cat),
    **dict.fromkeys(("roll", "flip"), _turned),
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    **dict.fromkeys(("pixel_shuffle", "pixel_unshuffle"), _shuffle),
    "masked_fill": _masked,
    **dict.fromkeys(("repeat", "select_scatter", "slice_scatter"), _spread),
    "select": _select,
    "getitem": _getitem,
    "index": _indexed,
}
MOVES = (*_SAME, *_CASTS, *_DROPOUTS, *_RULES)
