"""Bounds of an operator's output and of its change, from bounds of its inputs.

The change after a linear operator has no bias. Products: a'b' - ab = a'(b' - b) + (a' - a)b. Maxima change by at most
the change of their inputs, activation functions by at most that times their slope.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgeprune.bounds.activations import activation, changes, values
from edgeprune.bounds.interval import Interval, NoRule, Value, point, rounded, slack
from edgeprune.bounds.linear import LINEAR_POOLS, MAXIMA, WEIGHTED, pooled, pooled_change, reduced, weighted
from edgeprune.bounds.shape_ops import PADDING, Bounded, rearranged, shrunk
from edgeprune.models import Call, affine


@dataclass(frozen=True)
class Change:
    """A tensor that changes. before: bounds of its values, if known. by: bounds of the difference."""

    before: Value | None
    by: Value

    @property
    def old(self) -> Value:
        """Bounds of the values before the change."""
        if self.before is None:
            raise NoRule("the bound of a change needs the values, and they have none")
        return self.before

    @property
    def new(self) -> Value:
        """Bounds of the values after the change."""
        return Value(self.old.bounds + self.by.bounds, self.by.shape)


def computed(call: Call, args: Sequence[Any]) -> Bounded:
    """Bounds of a call's output.

    Args:
        args: its arguments, with a `Value` for each tensor that depends on the input; constant tensors have the dtype
            of the bounds.
    """
    if call.op in _VALUES:
        return _packed(call, _VALUES[call.op](call, args))
    function = activation(call)
    if function:
        return Value(values(call, function, args[0].bounds), call.shape)
    return rearranged(call, args)


def changed(call: Call, args: Sequence[Any]) -> Bounded:
    """Bounds of the change of a call's output: as `computed`, with `Change`s instead of `Value`s."""
    if call.op in _CHANGES:
        return _packed(call, _CHANGES[call.op](call, args))
    function = activation(call)
    if function:
        return Value(changes(function, args[0].by.bounds, args[0].old.bounds), call.shape)
    settings = list(_by(args))
    if call.op in ("add", "sub") and isinstance(settings[1], (int, float)):
        settings[1] = 0.0
    if call.op in PADDING:
        settings[call.names.index("value")] = 0.0
    return computed(call, settings)


def _packed(call: Call, out: Interval) -> Bounded:
    # An operator with indices has a tuple as its output, of which only the values are bounded.
    value = Value(out, call.shape)
    return (value,) if call.op.endswith("_with_indices") else value


def _by(args: Any) -> Any:
    """Arguments with the change of each tensor, 0 for constants."""
    if isinstance(args, (tuple, list)):
        return tuple(_by(a) for a in args)
    if isinstance(args, Tensor):
        return torch.zeros_like(args) if args.is_floating_point() else args
    return args.by if isinstance(args, Change) else args


def paired(call: Call, first: Any, second: Any) -> tuple[Interval, Interval]:
    """The bounds of two operands or numbers, for broadcasting."""
    beside = [v for v in (first, second) if isinstance(v, Value)]
    like, rank = beside[0].bounds.lo, len(call.shape)
    out: list[Interval] = []
    for operand in (first, second):
        if isinstance(operand, Tensor):
            out.append(shrunk(operand.to(like.dtype), beside).ranked(rank))
        elif isinstance(operand, Value):
            out.append(operand.ranked(rank))
        else:
            exact = torch.full((1,) * (rank + 1), float(operand), dtype=torch.float64)
            number = exact.to(like.dtype)
            out.append(point(number) if bool(number == exact) else rounded(number, number))
    return out[0], out[1]


def _weighted(call: Call, args: Sequence[Any]) -> Interval:
    x, weight, bias = args[:3]
    _check_constant(x, weight, bias)
    out = weighted(call, weight, x)
    return out if bias is None else out + point(bias.reshape(-1, *(1,) * (weight.ndim - 2)))


def _weighted_change(call: Call, args: Sequence[Any]) -> Interval:
    x, weight, bias = args[:3]
    _check_constant(x, weight, bias)
    return weighted(call, weight, x.by)


def _check_constant(x: Any, weight: Any, bias: Any) -> None:
    if (
        isinstance(x, Tensor)
        or not isinstance(weight, Tensor)
        or not (bias is None or isinstance(bias, Tensor))
    ):
        raise NoRule("its weights depend on the input")


def _batch_norm(call: Call, args: Sequence[Any]) -> Interval:
    scale, shift, size = _scale_and_shift(call, args)
    out = _scaled(args[0].full([1]), scale)
    moved_by = _channels(shift, out)
    wide = slack(out.lo.dtype, 4) * _channels(size, out)
    return rounded(out.lo + (moved_by - wide), out.hi + (moved_by + wide))


def _scale_and_shift(call: Call, args: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Scale and shift of batch-norm, and the shift's magnitude before cancellation, float64 (C,) each."""
    weight, bias, mean, variance = (None if w is None else w.double() for w in args[1:5])
    if mean is None or variance is None or call.arg("training"):
        raise NoRule("it normalizes with the statistics of its batch")
    scale, shift = affine(mean, variance, weight, bias, call.arg("eps"))
    size = (mean * scale).abs()
    return scale, shift, size if bias is None else size + bias.abs()


def _channels(weight: Tensor, out: Interval) -> Tensor:
    """One number per channel in the shape and dtype of bounds (B, 1, C, ...)."""
    return weight.to(out.lo.dtype).reshape(-1, *(1,) * (out.lo.ndim - 3))


def _scaled(x: Interval, scale: Tensor) -> Interval:
    factor = _channels(scale, x)
    low, high = x.lo * factor, x.hi * factor
    return rounded(torch.minimum(low, high), torch.maximum(low, high), 4)


def _sum(call: Call, args: Sequence[Any]) -> Interval:
    first, second = paired(call, args[0], args[1])
    second = second.scaled(call.arg("alpha")) if call.arg("alpha") != 1 else second
    return first + second if call.op == "add" else first - second


def _mul(call: Call, args: Sequence[Any]) -> Interval:
    first, second = paired(call, args[0], args[1])
    return first * second


def _mul_change(call: Call, args: Sequence[Any]) -> Interval:
    """The intersection of both ways to split the change of a product."""
    first, second = args[:2]
    if not isinstance(first, Change):
        first, second = second, first
    if not isinstance(second, Change):
        return _mul(call, (first.by, second))

    def split(a: Change, b: Change) -> Interval:
        return _mul(call, (a.new, b.by)) + _mul(call, (a.by, b.old))

    return split(first, second).intersect(split(second, first))


def _div(call: Call, args: Sequence[Any]) -> Interval:
    first, second = args[:2]
    rounds = "rounding_mode" in call.names and call.arg("rounding_mode") is not None
    if not isinstance(first, Value) or not isinstance(second, (int, float)) or not second or rounds:
        raise NoRule("it divides by something else than a number, or rounds")
    out = first.bounds.scaled(1 / second)
    return rounded(out.lo, out.hi, 2)


_VALUES: Mapping[str, Callable[[Call, Sequence[Any]], Interval]] = {
    **dict.fromkeys(WEIGHTED, _weighted),
    **dict.fromkeys((*MAXIMA, *LINEAR_POOLS), lambda call, args: pooled(call, args[0])),
    **dict.fromkeys(("mean", "sum"), lambda call, args: reduced(call, args[0])),
    **dict.fromkeys(("add", "sub"), _sum),
    "mul": _mul,
    "div": _div,
    "batch_norm": _batch_norm,
}
_CHANGES: Mapping[str, Callable[[Call, Sequence[Any]], Interval]] = {
    **dict.fromkeys(WEIGHTED, _weighted_change),
    **dict.fromkeys(MAXIMA, lambda call, args: pooled_change(call, args[0].by)),
    "mul": _mul_change,
    "batch_norm": lambda call, args: _scaled(args[0].by.full([1]), _scale_and_shift(call, args)[0]),
}
