"""Bounds of how much the output of an operator changes, from bounds of how much its operands change.

Affine maps pass a change on without their bias; where the weights themselves change,
W'x' - Wx = W'(x' - x) + (W' - W)x. Products: a'b' - ab = a'(b' - b) + (a' - a)b. Maxima change by no more than what
they are taken over, functions by no more than their slopes allow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgeprune.bounds.activations import CLAMPS, changes, clamped, curve
from edgeprune.bounds.interval import Interval, NoRule, Value, constant, rounded, slack, zero
from edgeprune.bounds.linear import (
    ADAPTIVE,
    AVERAGES,
    MAXIMA,
    UPSAMPLED,
    WEIGHTED,
    einsum,
    matrices,
    pooled_change,
    weighted,
)
from edgeprune.bounds.operators import PRODUCTS, batch_scale, channels, computed, paired, scaled
from edgeprune.bounds.shape_ops import MOVES, Moved, moved
from edgeprune.models import Call


@dataclass(frozen=True)
class Change:
    """A tensor that changes. before, after: bounds of its two values, None when unknown. by: of their difference."""

    before: Value | None
    by: Value
    after: Value | None = None

    def old(self) -> Value:
        """Bounds before the change."""
        if self.before is None:
            raise NoRule("the bound of a change needs one of the values, and they have none")
        return self.before

    def new(self) -> Value:
        """Bounds after the change: what they were plus the change, and what is known of them otherwise."""
        if self.before is None and self.after is not None:
            return self.after
        moved_to = Value(self.old().bounds + self.by.bounds, self.by.shape)
        return (
            moved_to if self.after is None else Value(moved_to.bounds.meet(self.after.bounds), self.by.shape)
        )


@dataclass(frozen=True)
class Fixed:
    """A tensor that does not depend on the input: the dense network's and the changed one's."""

    before: Tensor
    after: Tensor

    @property
    def same(self) -> bool:
        """Whether both networks have the same."""
        return self.before is self.after or torch.equal(self.before, self.after)


def replaced(args: Any, fn: Callable[[Any], Any]) -> Any:
    """Arguments with something else in the place of each tensor."""
    if isinstance(args, (tuple, list)):
        return tuple(replaced(a, fn) for a in args)
    return fn(args) if isinstance(args, (Change, Fixed)) else args


def old_of(tensor: Change | Fixed) -> Value | Tensor:
    """What it was."""
    return tensor.old() if isinstance(tensor, Change) else tensor.before


def new_of(tensor: Change | Fixed) -> Value | Tensor:
    """What it becomes."""
    return tensor.new() if isinstance(tensor, Change) else tensor.after


def change_of(tensor: Change | Fixed) -> Value:
    """The change itself."""
    if isinstance(tensor, Change):
        return tensor.by
    if tensor.same:
        return zero(tensor.before.shape, tensor.before)
    difference = constant(tensor.after - tensor.before)
    return Value(rounded(difference.bounds.lo, difference.bounds.hi), difference.shape)


def still_of(args: Sequence[Any]) -> Tensor:
    """(B,): whether nothing has changed for a candidate."""
    tensors: list[Change | Fixed] = []
    replaced(args, tensors.append)
    still = torch.tensor([all(t.same for t in tensors if isinstance(t, Fixed))])
    for tensor in tensors:
        if isinstance(tensor, Change):
            bounds = tensor.by.bounds
            still = still & ((bounds.lo == 0) & (bounds.hi == 0)).flatten(1).all(1)
    return still


def held(out: Interval, still: Tensor) -> Interval:
    """A change with 0 where a candidate (B,) stays as it is."""
    mask = still.reshape(-1, *(1,) * (out.lo.ndim - 1))
    return Interval(out.lo.masked_fill(mask, 0.0), out.hi.masked_fill(mask, 0.0))


# Where these operators add or fill in a number, a change gets none of it.
_ADDED = {"add": "other", "sub": "other", "rsub": "other", "pad": "value", "constant_pad_nd": "value"}


def changed(call: Call, args: Sequence[Any]) -> Moved | None:
    """Bounds of the change of a call's output from those of what it reads.

    Args:
        call: the operator. args: its arguments, with a `Change` or a `Fixed` for each tensor.

    Returns:
        None when there is no rule, and only the ranges of the values before and after bound the change.
    """
    rule = _RULES.get(call.op)
    if rule:
        out = rule(call, args)
        return Value(out, call.shape) if isinstance(out, Interval) else out
    function = curve(call)
    if not function:
        return _linear(call, args)
    out = changes(function, args[0].by.bounds, _known(args[0]))
    return Value(out, call.shape) if out else None


def _known(tensor: Change) -> Interval | None:
    return tensor.before.bounds if tensor.before else None


def _linear(call: Call, args: Sequence[Any]) -> Moved | None:
    """Operators that are linear in all their tensors, and those that move entries: a change goes through as a value."""
    settings = list(args)
    if call.op in _ADDED:
        at = call.names.index(_ADDED[call.op])
        settings[at] = settings[at] if _is_tensor(settings[at]) else 0.0
    if call.op == "masked_fill":
        return moved(call, (change_of(args[0]), replaced(args[1], new_of), 0.0))
    if call.op in _LINEAR:
        return computed(call, replaced(settings, change_of))
    return moved(call, replaced(settings, _index_or_change))


def _index_or_change(tensor: Change | Fixed) -> Value | Tensor:
    whole = isinstance(tensor, Fixed) and not tensor.before.is_floating_point()
    return tensor.after if whole else change_of(tensor)  # type: ignore[union-attr]


def _weighted(call: Call, args: Sequence[Any]) -> Interval:
    x, weight, bias = args[:3]
    if not isinstance(x, Change) or not isinstance(weight, Fixed) or isinstance(bias, Change):
        raise NoRule("its weights depend on the input")
    out = weighted(call, weight.after, x.by)
    if not weight.same:
        out = out + weighted(call, weight.after - weight.before, x.old())
    if isinstance(bias, Fixed) and not bias.same:
        shift = (bias.after - bias.before).reshape(-1, *(1,) * (weight.after.ndim - 2))
        out = out + rounded(shift, shift)
    return out


def _batch_norm(call: Call, args: Sequence[Any]) -> Interval:
    x, weights = args[0], args[1:5]
    eps = call.arg("eps")
    scale, shift, size = batch_scale([w.after if w else None for w in weights], eps)
    out = scaled(x.by.full([1]), scale)
    if all(w is None or w.same for w in weights):
        return out
    first_scale, first_shift, first_size = batch_scale([w.before if w else None for w in weights], eps)
    inside = x.old().full([1])
    out = out + scaled(inside, scale - first_scale)
    moved_by = channels(shift - first_shift, out)
    # Scales and shifts are differences of float64 numbers, each with its own rounding error.
    wide = slack(torch.float64, 8) * (
        channels(scale.abs() + first_scale.abs(), out) * inside.magnitude + channels(size + first_size, out)
    )
    out = out + rounded(moved_by, moved_by)
    return Interval(out.lo - wide, out.hi + wide)


def _product(a: Any, b: Any, multiply: Callable[[Value | Tensor, Value | Tensor], Interval]) -> Interval:
    """a'(b' - b) + (a' - a)b, the parts that are not 0."""
    parts: list[Interval] = []
    if _moves(b):
        parts.append(multiply(new_of(a), change_of(b)))
    if _moves(a):
        parts.append(multiply(change_of(a), old_of(b)))
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def _moves(tensor: Any) -> bool:
    return isinstance(tensor, Change) or not tensor.same


def _matrices(call: Call, args: Sequence[Any]) -> Interval:
    return _product(args[0], args[1], matrices)


def _einsum(call: Call, args: Sequence[Any]) -> Interval:
    if len(args[1]) != 2:
        raise NoRule(f"an Einstein sum over {len(args[1])} tensors")
    return _product(args[1][0], args[1][1], lambda a, b: einsum(args[0], a, b))


def _addmm(call: Call, args: Sequence[Any]) -> Interval:
    out = Value(_product(args[1], args[2], matrices).scaled(call.arg("alpha")), call.shape)
    first, second = paired(call, change_of(args[0]), out)
    return first.scaled(call.arg("beta")) + second


def _mul(call: Call, args: Sequence[Any]) -> Interval:
    first, second = args[:2]
    if not (_is_tensor(first) and _is_tensor(second)):
        factor, tensor = (second, first) if _is_tensor(first) else (first, second)
        return tensor.by.bounds.scaled(factor)

    def multiply(a: Value | Tensor, b: Value | Tensor) -> Interval:
        one, other = paired(call, a, b)
        return one * other

    out = _product(first, second, multiply)
    if not (_moves(first) and _moves(second)):
        return out
    return out.meet(_product(second, first, multiply))


def _div(call: Call, args: Sequence[Any]) -> Interval:
    """a'/b' - a/b = ((a' - a) - (a/b)(b' - b)) / b'."""
    first, second = args[:2]
    if "rounding_mode" in call.names and call.arg("rounding_mode") is not None:
        raise NoRule("it rounds its result")
    top, divisor = paired(call, _by_or_number(first), new_of(second) if _is_tensor(second) else second)
    if bool(((divisor.lo <= 0) & (divisor.hi >= 0)).any()):
        raise NoRule("it divides by what may be 0")
    if _is_tensor(second) and _moves(second):
        ratio, step = paired(call, computed(call, replaced(args, old_of)), change_of(second))
        top = top - ratio * step
    return top * rounded(1 / divisor.hi, 1 / divisor.lo)


def _is_tensor(operand: Any) -> bool:
    return isinstance(operand, (Change, Fixed))


def _by_or_number(operand: Any) -> Value | float:
    """The change of an operand; a number does not change."""
    return change_of(operand) if _is_tensor(operand) else 0.0


def _extreme(call: Call, args: Sequence[Any]) -> Interval:
    first, second = (_by_or_number(a) for a in args[:2])
    one, other = paired(call, first, second)
    return one.hull(other)


def _reduced(call: Call, args: Sequence[Any]) -> Moved:
    """A maximum or minimum over axes changes by no less than the least and no more than the largest change."""
    by = args[0].by
    dims = call.arg("dim") if "dim" in call.names else None
    axes = [d % by.rank + 1 for d in ((dims,) if isinstance(dims, int) else dims or range(by.rank))]
    keep = "keepdim" in call.names and bool(call.arg("keepdim"))
    out = Value(Interval(by.bounds.lo.amin(axes, keep), by.bounds.hi.amax(axes, keep)), call.shape)
    return (out,) if call.op in ("max", "min") and "dim" in call.names else out


def _pooled(call: Call, args: Sequence[Any]) -> Moved:
    out = Value(pooled_change(call, args[0].by), call.shape)
    return out if call.shape else (out,)


def _where(call: Call, args: Sequence[Any]) -> Moved | None:
    if isinstance(args[0], Change):
        return None
    chosen = [_by_or_number(a) for a in args[1:3]]
    return computed(call, (args[0].after, *chosen))


def _prelu(call: Call, args: Sequence[Any]) -> Moved | None:
    x, weight = args
    if not isinstance(weight, Fixed) or not weight.same:
        return None
    slope = weight.after.reshape(-1, *(1,) * max(x.by.rank - 2, 0))
    passed = clamped(x.by.bounds, _known(x), 0.0, float("inf"))
    return Value(x.by.bounds.scaled(slope) + passed.scaled(1 - slope), call.shape)


_LINEAR = ("add", "sub", "rsub", "mean", "sum", *AVERAGES, *ADAPTIVE, *UPSAMPLED)
# Their rules bound a change as well as the ranges of the values can, and do not ask where the values are after it.
TIGHT = frozenset((*WEIGHTED, "batch_norm", *MAXIMA, *_LINEAR, *CLAMPS, *MOVES))
_RULES: Mapping[str, Callable[[Call, Sequence[Any]], Interval | Moved | None]] = {
    **dict.fromkeys(WEIGHTED, _weighted),
    **dict.fromkeys(PRODUCTS, _matrices),
    **dict.fromkeys(MAXIMA, _pooled),
    **dict.fromkeys(("amax", "amin", "max", "min"), _reduced),
    **dict.fromkeys(("maximum", "minimum"), _extreme),
    "mul": _mul,
    "div": _div,
    "where": _where,
    "addmm": _addmm,
    "einsum": _einsum,
    "batch_norm": _batch_norm,
    "prelu": _prelu,
}
