"""Shape operators: views, permutations, slices, splits, concatenations, padding; for values and for changes.

An axis that is a hull stays one where the operator allows; otherwise it is expanded.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from edgeprune.bounds.interval import Interval, NoRule, Value, constant
from edgeprune.models import Call

Bounded = Value | tuple[Value, ...]


def rearranged(call: Call, args: Sequence[Any]) -> Bounded:
    """Bounds of the output of a shape operator."""
    rule = _RULES.get(call.op)
    if rule is None:
        raise NoRule(f"there is no rule for {call.op}")
    return rule(call, args)


def _same(call: Call, args: Sequence[Any]) -> Value:
    cast = next((a for a in args if isinstance(a, torch.dtype)), torch.float32)
    if cast not in (torch.float32, torch.float64):
        raise NoRule(f"it rounds to {cast}")
    if "dropout" in call.op and call.arg("train"):
        raise NoRule("it is random, although the network is in eval mode")
    return Value(args[0].bounds, call.shape)


def _both(x: Value, fn: Callable[[Tensor], Tensor]) -> Interval:
    return Interval(fn(x.bounds.lo), fn(x.bounds.hi))


def _view(call: Call, args: Sequence[Any]) -> Value:
    """A group of axes that are all hulls stays a hull."""
    x = args[0]
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
    """Runs of axes that hold the same entries before and after a view, in order."""
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
    x = args[0]
    order = list(range(x.rank))
    if call.op == "permute":
        order = [d % x.rank for d in args[1]]
    elif x.rank > 1:
        first, second = (d % x.rank for d in (args[1:3] if call.op == "transpose" else (0, 1)))
        order[first], order[second] = second, first
    return Value(_both(x, lambda v: v.permute(0, *(d + 1 for d in order))), call.shape)


def _reshaped(call: Call, args: Sequence[Any]) -> Value:
    """squeeze and unsqueeze: only axes of size 1 change."""
    x = args[0]
    kept = iter([k for k, size in zip(x.kept, x.shape, strict=True) if size != 1])
    size = (x.bounds.lo.shape[0], *(1 if s == 1 else next(kept) for s in call.shape))
    return Value(_both(x, lambda v: v.reshape(size)), call.shape)


def _slice(call: Call, args: Sequence[Any]) -> Value:
    x = args[0]
    axis = args[1] % x.rank
    if x.collapsed(axis):
        return Value(x.bounds, call.shape)
    picked = slice(*(args[2:5] if call.op == "slice" else (args[2], _end(x.shape[axis], *args[2:4]))))
    at = (slice(None),) * (axis + 1)
    return Value(_both(x, lambda v: v[(*at, picked)]), call.shape)


def _end(size: int, start: int, length: int) -> int:
    return start % size + length if start < 0 else start + length


def _split(call: Call, args: Sequence[Any]) -> tuple[Value, ...]:
    x, size = args[:2]
    axis = args[-1] % x.rank
    total = x.shape[axis]
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
        raise NoRule("it uses the positions of maxima")
    return Value(args[0][args[1]].bounds, call.shape)


def _cat(call: Call, args: Sequence[Any]) -> Value:
    """Along an axis over which one part is a hull, the output is a hull of all parts."""
    beside = [p for p in args[0] if isinstance(p, Value)]
    parts = [p if isinstance(p, Value) else shrunk(p, beside) for p in args[0]]
    axis = args[1] % len(call.shape)
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
    """A constant as a hull over the axes, counted from the last, over which another operand is one."""
    value = constant(values)
    axes = [
        -a
        for a in range(1, value.rank + 1)
        if any(a <= b.rank and b.collapsed(b.rank - a) for b in beside) and value.shape[-a] > 1
    ]
    if not axes:
        return value
    return Value(Interval(value.bounds.lo.amin(axes, True), value.bounds.hi.amax(axes, True)), value.shape)


def _pad(call: Call, args: Sequence[Any]) -> Bounded:
    x, sides = args[:2]
    mode = args[2] if call.op == "pad" else "constant"
    fill = float(args[3 if call.op == "pad" else 2] or 0.0)
    if mode != "constant":
        raise NoRule(f"it pads by {mode!r}")
    axes = [x.rank - 1 - i // 2 for i in range(len(sides))]
    open_sides = [0 if x.collapsed(axis) else side for axis, side in zip(axes, sides, strict=True)]
    out = x.bounds
    if any(x.collapsed(axis) and side > 0 for axis, side in zip(axes, sides, strict=True)):
        out = out.hull(fill)
    pad = functional.pad
    return Value(
        Interval(pad(out.lo, open_sides, value=fill), pad(out.hi, open_sides, value=fill)), call.shape
    )


PADDING = ("pad", "constant_pad_nd")
_RULES: Mapping[str, Callable[[Call, Sequence[Any]], Bounded]] = {
    **dict.fromkeys(("alias", "clone", "contiguous", "detach", "lift_fresh_copy"), _same),
    **dict.fromkeys(("to", "_to_copy", "type_as", "dropout", "feature_dropout", "alpha_dropout"), _same),
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_copy"), _view),
    **dict.fromkeys(("permute", "transpose", "t"), _permute),
    **dict.fromkeys(("squeeze", "unsqueeze"), _reshaped),
    **dict.fromkeys(("slice", "narrow"), _slice),
    **dict.fromkeys(("split", "split_with_sizes", "chunk"), _split),
    **dict.fromkeys(("cat", "concat"), _cat),
    **dict.fromkeys(PADDING, _pad),
    "getitem": _getitem,
}
