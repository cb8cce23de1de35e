"""Bounds of what each operator of a network computes, from bounds of what it reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from edgeprune.bounds.activations import curve, values
from edgeprune.bounds.interval import Interval, NoRule, Value, constant, point, rounded, slack
from edgeprune.bounds.linear import (
    PLACED,
    PLACED_ADAPTIVE,
    POOLS,
    REDUCTIONS,
    WEIGHTED,
    einsum,
    matrices,
    pooled,
    reduced,
    weighted,
)
from edgeprune.bounds.shape_ops import Moved, moved, shrunk
from edgeprune.models import Call

PRODUCTS = ("matmul", "mm", "bmm")
COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")


def computed(call: Call, args: Sequence[Any]) -> Moved:
    """Bounds of a call's output.

    Args:
        args: its arguments, with a `Value` for each tensor that depends on the input and a constant tensor, in the
            dtype of the bounds, for each that does not.
    """
    rule = _RULES.get(call.op)
    if rule:
        out = rule(call, args)
        if call.op in (*PLACED, *PLACED_ADAPTIVE) or (call.op in ("max", "min") and "dim" in call.names):
            return (Value(out, call.shape),)
        return Value(out, call.shape)
    function = curve(call)
    if function:
        return Value(values(call, function, valued(args[0]).bounds), call.shape)
    found = moved(call, args)
    if found is None:
        raise NoRule(f"there is no rule for {call.op}")
    return found


def valued(operand: Any) -> Value:
    """A tensor's bounds; a constant's are itself."""
    if isinstance(operand, Value):
        return operand
    if isinstance(operand, Tensor):
        return constant(operand)
    raise NoRule(f"it reads {operand!r}")


def paired(call: Call, first: Any, second: Any) -> tuple[Interval, Interval]:
    """The bounds of two operands, numbers too, ready for broadcasting against each other."""
    beside = [v for v in (first, second) if isinstance(v, Value)]
    like = beside[0].bounds.lo if beside else None
    rank = len(call.shape)
    out: list[Interval] = []
    for operand in (first, second):
        if isinstance(operand, Tensor):
            out.append(shrunk(operand if like is None else operand.to(like.dtype), beside).ranked(rank))
        elif isinstance(operand, Value):
            out.append(operand.ranked(rank))
        else:
            exact = torch.full((1,) * (rank + 1), float(operand), dtype=torch.float64)
            number = exact if like is None else exact.to(like.dtype)
            out.append(point(number) if bool(number == exact) else rounded(number, number))
    return out[0], out[1]


def batch_scale(weights: Sequence[Tensor | None], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Batch-norm in eval mode as x times scale plus shift, and a bound of the shift's magnitude before cancellation.

    Returns:
        three float64 (C,).
    """
    weight, bias, mean, variance = (None if w is None else w.double() for w in weights)
    if mean is None or variance is None:
        raise NoRule("it normalizes with the statistics of its batch")
    scale = (variance + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = -mean * scale
    size = shift.abs()
    return scale, shift if bias is None else shift + bias, size if bias is None else size + bias.abs()


def _weighted(call: Call, args: Sequence[Any]) -> Interval:
    x, weight, bias = args[:3]
    if not isinstance(x, Value) or not isinstance(weight, Tensor) or isinstance(bias, Value):
        raise NoRule("its weights depend on the input")
    out = weighted(call, weight, x)
    return out if bias is None else out + point(bias.reshape(-1, *(1,) * (weight.ndim - 2)))


def _batch_norm(call: Call, args: Sequence[Any]) -> Interval:
    if call.arg("training"):
        raise NoRule("it normalizes with the statistics of its batch")
    scale, shift, size = batch_scale(args[1:5], call.arg("eps"))
    out = scaled(valued(args[0]).full([1]), scale)
    moved_by = channels(shift, out)
    wide = slack(out.lo.dtype, 4) * channels(size, out)
    return rounded(out.lo + (moved_by - wide), out.hi + (moved_by + wide))


def channels(weight: Tensor, out: Interval) -> Tensor:
    """A number per channel, shaped for bounds (B, 1, C, ...) and in their dtype."""
    return weight.to(out.lo.dtype).reshape(-1, *(1,) * (out.lo.ndim - 3))


def scaled(x: Interval, scale: Tensor) -> Interval:
    """Times a number per channel (float64), for bounds (B, 1, C, ...)."""
    factor = channels(scale, x)
    low, high = x.lo * factor, x.hi * factor
    return rounded(torch.minimum(low, high), torch.maximum(low, high), 4)


def _product(call: Call, args: Sequence[Any]) -> Interval:
    return matrices(args[0], args[1])


def _addmm(call: Call, args: Sequence[Any]) -> Interval:
    out = Value(matrices(args[1], args[2]).scaled(call.arg("alpha")), call.shape)
    first, second = paired(call, args[0], out)
    return first.scaled(call.arg("beta")) + second


def _einsum(call: Call, args: Sequence[Any]) -> Interval:
    if len(args[1]) != 2:
        raise NoRule(f"an Einstein sum over {len(args[1])} tensors")
    return einsum(args[0], *args[1])


def _sum(call: Call, args: Sequence[Any]) -> Interval:
    first, second = paired(call, args[0], args[1])
    second = second.scaled(call.arg("alpha")) if call.arg("alpha") != 1 else second
    return first + second if call.op == "add" else first - second


def _rsub(call: Call, args: Sequence[Any]) -> Interval:
    first, second = paired(call, args[0], args[1])
    return second - first.scaled(call.arg("alpha"))


def _mul(call: Call, args: Sequence[Any]) -> Interval:
    first, second = paired(call, args[0], args[1])
    return first * second


def _div(call: Call, args: Sequence[Any]) -> Interval:
    if "rounding_mode" in call.names and call.arg("rounding_mode") is not None:
        raise NoRule("it rounds its result")
    first, second = paired(call, args[0], args[1])
    if bool(((second.lo <= 0) & (second.hi >= 0)).any()):
        raise NoRule("it divides by what may be 0")
    return first * rounded(1 / second.hi, 1 / second.lo)


def _extreme(call: Call, args: Sequence[Any]) -> Interval:
    first, second = paired(call, args[0], args[1])
    pick = torch.maximum if call.op == "maximum" else torch.minimum
    return Interval(pick(first.lo, second.lo), pick(first.hi, second.hi))


def _compared(call: Call, args: Sequence[Any]) -> Interval:
    """A truth value counts as 0 or 1, whichever it may be."""
    first, second = paired(call, args[0], args[1])
    like = (first.lo + second.lo) * 0
    return Interval(like, like + 1)


def _where(call: Call, args: Sequence[Any]) -> Interval:
    first, second = paired(call, args[1], args[2])
    if isinstance(args[0], Value):
        return first.hull(second)
    condition = args[0].reshape(1, *(1,) * (len(call.shape) - args[0].ndim), *args[0].shape)
    return Interval(torch.where(condition, first.lo, second.lo), torch.where(condition, first.hi, second.hi))


def _prelu(call: Call, args: Sequence[Any]) -> Interval:
    x, weight = valued(args[0]), args[1]
    if isinstance(weight, Value):
        raise NoRule("its slopes depend on the input")
    slope = weight.reshape(-1, *(1,) * max(x.rank - 2, 0))
    inside = x.full([1]) if weight.numel() > 1 else x.bounds
    ends = [v.clamp(min=0.0) + slope * v.clamp(max=0.0) for v in (inside.lo, inside.hi)]
    out = Interval(torch.minimum(*ends), torch.maximum(*ends))
    crosses = (inside.lo < 0) & (inside.hi > 0)
    at_zero = out.hull(0.0)
    return rounded(torch.where(crosses, at_zero.lo, out.lo), torch.where(crosses, at_zero.hi, out.hi))


def _glu(call: Call, args: Sequence[Any]) -> Interval:
    x = valued(args[0])
    axis = call.arg("dim") % x.rank
    inside = x.full([axis])
    half = x.shape[axis] // 2
    first, second = (
        Interval(inside.lo.narrow(axis + 1, at, half), inside.hi.narrow(axis + 1, at, half))
        for at in (0, half)
    )
    return first * rounded(torch.sigmoid(second.lo), torch.sigmoid(second.hi), 8)


def _vector_norm(call: Call, args: Sequence[Any]) -> Interval:
    x = valued(args[0])
    dims = call.arg("dim")
    axes = [d % x.rank for d in (range(x.rank) if dims is None else dims)]
    inside = x.full(axes)
    least = torch.maximum(inside.lo, -inside.hi).clamp(min=0.0)
    over = [a + 1 for a in axes]
    ends = [
        torch.linalg.vector_norm(v, call.arg("ord"), over, call.arg("keepdim"))
        for v in (least, inside.magnitude)
    ]
    return rounded(ends[0], ends[1], 4 * max(1, inside.lo[0].numel()))


_RULES: Mapping[str, Callable[[Call, Sequence[Any]], Interval]] = {
    **dict.fromkeys(WEIGHTED, _weighted),
    **dict.fromkeys(PRODUCTS, _product),
    **dict.fromkeys(POOLS, lambda call, args: pooled(call, valued(args[0]))),
    **dict.fromkeys(REDUCTIONS, lambda call, args: reduced(call, valued(args[0]))),
    **dict.fromkeys(COMPARISONS, _compared),
    **dict.fromkeys(("add", "sub"), _sum),
    **dict.fromkeys(("maximum", "minimum"), _extreme),
    "rsub": _rsub,
    "mul": _mul,
    "div": _div,
    "where": _where,
    "addmm": _addmm,
    "einsum": _einsum,
    "batch_norm": _batch_norm,
    "prelu": _prelu,
    "glu": _glu,
    "linalg_vector_norm": _vector_norm,
}
