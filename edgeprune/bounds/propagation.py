"""Propagation of bounds, and of bounds of changes, through a traced network."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from edgeprune.bounds.interval import Interval, NoRule, Unbounded, Value, zero
from edgeprune.bounds.linear import WEIGHTED, channel_matrices
from edgeprune.bounds.operators import Change, changed, computed
from edgeprune.bounds.shape_ops import Bounded
from edgeprune.models import Call, Program, Ref, Weight

# Their output depends only on the shape and dtype of the first tensor.
_SHAPE_ONLY = ("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "fill")


@dataclass(frozen=True)
class Bounds:
    """Bounds of every call's output over a box of inputs.

    values: name of a call, or of the input -> bounds. constants: name of a call that does not depend on the input ->
    its output. causes: name of a call without a bound -> the operator that has none, it or one before it.
    """

    values: dict[str, Bounded]
    constants: dict[str, Any]
    causes: dict[str, Unbounded]

    @cached_property
    def intervals(self) -> dict[str, Interval]:
        """Name of a call, or of the input -> (B, ...); an axis of positions that is collapsed has size 1."""
        return {n: without_batch_axis(v) for n, v in self.values.items() if isinstance(v, Value)}


class Weights:
    """The tensors of a network by name, in the dtype of the bounds."""

    def __init__(self, program: Program, state: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._state = state
        self._constants = program.constants

    def __call__(self, name: str) -> Tensor:
        """A tensor in the dtype of the bounds."""
        return self.cast((self._state[name] if name in self._state else self._constants[name]).detach())

    def cast(self, value: Any) -> Any:
        """Convert floating-point tensors to the dtype of the bounds."""
        floats = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(self.dtype) if floats else value


def with_batch_axis(given: Interval, shape: tuple[int, ...], what: str) -> Value:
    """Bounds (B, ...) of a tensor with a batch axis of 1 as (B, 1, ...); missing axes at the end have size 1."""
    batched = shape[:1] == (1,)
    wanted = shape[1:] if batched else shape
    rest = tuple(given.lo.shape[1:])
    kept = (*rest, *(1,) * (len(wanted) - len(rest)))
    if len(kept) != len(wanted) or any(k not in (1, w) for k, w in zip(kept, wanted, strict=True)):
        raise ValueError(
            f"{what} has shape {tuple(given.lo.shape)}, expected (B, {', '.join(map(str, wanted))})"
        )
    size = (given.lo.shape[0], *((1,) if batched else ()), *kept)
    return Value(Interval(given.lo.reshape(size), given.hi.reshape(size)), shape)


def without_batch_axis(value: Value) -> Interval:
    """The inverse of `with_batch_axis`."""
    if value.shape[:1] != (1,):
        return value.bounds
    return Interval(value.bounds.lo.squeeze(1), value.bounds.hi.squeeze(1))


def _value(program: Program, call: Call, weights: Weights, bounds: Bounds) -> Any:

    def known(name: str) -> Any:
        return bounds.constants[name] if name in bounds.constants else bounds.values[name]

    if all(name in bounds.constants for name in call.reads):
        return _run(call, _filled(call.args, known, weights), weights)
    if call.op in _SHAPE_ONLY:
        blank = torch.zeros(program.shape_of(call.reads[0]))
        return _run(call, (blank, *_filled(call.args[1:], known, weights)), weights)
    found = computed(call, _filled(call.args, known, weights))
    _check_finite(found)
    return found


def _filled(args: Any, known: Callable[[str], Any], weight: Callable[[str], Any]) -> Any:
    if isinstance(args, tuple):
        return tuple(_filled(a, known, weight) for a in args)
    if isinstance(args, Ref):
        return known(args.name)
    return weight(args.name) if isinstance(args, Weight) else args


def _run(call: Call, args: tuple[Any, ...], weights: Weights) -> Any:
    out = call.run(args)
    return tuple(weights.cast(o) for o in out) if isinstance(out, (tuple, list)) else weights.cast(out)


def _check_finite(found: Bounded) -> None:
    parts = found if isinstance(found, tuple) else (found,)
    if not all(part.bounds.finite for part in parts):
        raise NoRule(f"its bounds exceed {parts[0].bounds.lo.dtype}")


def activation_bounds(
    program: Program, state: Mapping[str, Tensor], box: Interval, *, collapsed: bool
) -> Bounds:
    """Bounds of every activation over a box of inputs.

    Args:
        box: (B, C, H, W), B boxes, float32 or float64: the dtype of all bounds.
        collapsed: one interval per channel instead of one per entry.
    """
    start = with_batch_axis(box, program.input_shape, "the box")
    if collapsed and start.rank > 2:
        axes = list(range(3, start.rank + 1))
        hull = Interval(start.bounds.lo.amin(axes, True), start.bounds.hi.amax(axes, True))
        start = Value(hull, start.shape)
    weights = Weights(program, state, box.lo.dtype)
    bounds = Bounds({program.input: start}, {}, {})
    with torch.no_grad():
        for call in program.calls:
            cause = next((bounds.causes[name] for name in call.reads if name in bounds.causes), None)
            if cause is not None and call.op not in _SHAPE_ONLY:
                bounds.causes[call.name] = cause
                continue
            try:
                found = _value(program, call, weights, bounds)
            except NoRule as error:
                bounds.causes[call.name] = Unbounded(call.op, call.layer, str(error))
                continue
            bounded = isinstance(found[0] if isinstance(found, tuple) else found, Value)
            target: dict[str, Any] = bounds.values if bounded else bounds.constants
            target[call.name] = found
    return bounds


def delta_from(
    program: Program, state: Mapping[str, Tensor], bounds: Bounds, starts: Mapping[str, Interval]
) -> Interval:
    """Bounds (B, K) of the change of the network's output, over the box, when the outputs of some calls change.

    Args:
        starts: name of a call, or of the input -> change of its output for B candidates: (B, ...) as in
            `Bounds.intervals`; axes of size 1, and missing ones at the end, stand for all positions. A start downstream
            of another one is added to the propagated change.

    Raises:
        Unbounded: an operator downstream has no bound.
    """
    begin = {n: with_batch_axis(i, program.shape_of(n), f"the start at {n}") for n, i in starts.items()}
    like = next(iter(starts.values())).lo
    weights = Weights(program, state, like.dtype)
    changes: dict[str, Bounded] = {n: v for n, v in begin.items() if n == program.input}
    last = {name: i for i, call in enumerate(program.calls) for name in call.reads}
    with torch.no_grad():
        for i, call in enumerate(program.calls):
            if any(name in changes for name in call.reads) and call.name not in bounds.constants:
                changes[call.name] = _change(program, call, weights, bounds, changes)
            if call.name in begin:
                arrived, start = changes.get(call.name), begin[call.name]
                known = isinstance(arrived, Value)
                changes[call.name] = Value(arrived.bounds + start.bounds, start.shape) if known else start
            for name in set(call.reads):
                if last[name] == i and name != program.output:
                    changes.pop(name, None)
    found = changes.get(program.output, zero(program.shape_of(program.output), like))
    assert isinstance(found, Value)
    whole, batch = found.full(), max(v.bounds.lo.shape[0] for v in begin.values())
    whole = Interval(*(v.expand(batch, *v.shape[1:]) for v in (whole.lo, whole.hi)))
    return without_batch_axis(Value(whole, program.shape_of(program.output)))


def _change(
    program: Program, call: Call, weights: Weights, bounds: Bounds, changes: Mapping[str, Bounded]
) -> Bounded:
    def operand(name: str) -> Any:
        if name in bounds.constants:
            return bounds.constants[name]
        before, by = bounds.values.get(name), changes.get(name)
        if isinstance(by, tuple):
            olds = before if isinstance(before, tuple) else (None,) * len(by)
            return tuple(map(Change, olds, by))
        assert not isinstance(before, tuple)
        return Change(before, by or zero(program.shape_of(name), torch.zeros((), dtype=weights.dtype)))

    try:
        out = changed(call, _filled(call.args, operand, weights))
        _check_finite(out)
    except NoRule as error:
        raise bounds.causes.get(call.name) or Unbounded(call.op, call.layer, str(error)) from error
    return out


def consumer_impact(
    program: Program,
    state: Mapping[str, Tensor],
    call: Call,
    positions: Sequence[Sequence[int]],
    delta: Interval,
) -> Interval:
    """The change (B, outputs, 1, ...) of the output of a convolution or a linear layer: a start for `delta_from`.

    Args:
        positions: for each of B candidates the indices along the input axis that change: one for a channel of a
            convolution, H · W of them for a flattened channel.
        delta: (B,), the change of each of them, at any position.
    """
    names = call.weights
    if call.op not in WEIGHTED or not names:
        raise Unbounded(call.op, call.layer, "only convolutions and linear layers have input channels")
    weight = Weights(program, state, delta.lo.dtype)(names[0])
    layer = channel_matrices(call, weight)
    longest = max(len(p) for p in positions)
    # Shorter lists are padded with a channel that changes nothing.
    index = torch.tensor([[*p, *[-1] * (longest - len(p))] for p in positions])
    center, radius = (delta.hull(0.0) if layer.padded else delta).ball(longest * layer.terms)
    middle, reach = _columns(layer.total, index, center), _columns(layer.absolute, index, radius)
    spatial = weight.ndim - 2
    size = (len(positions), *(1,) * (len(call.shape) - 2 - spatial), -1, *(1,) * spatial)
    return Interval((middle - reach).reshape(size), (middle + reach).reshape(size))


def _columns(matrix: Tensor, index: Tensor, factor: Tensor) -> Tensor:
    """(B, groups · outputs): sums of columns of a matrix (groups, outputs, inputs), times `factor` (B,).

    Args:
        index: (B, n) columns, -1 for none.
    """
    groups, outputs, inputs = matrix.shape
    out = matrix.new_zeros(len(index), groups, outputs)
    candidates = torch.arange(len(index))
    for chosen in index.T:
        channel = chosen.clamp(min=0)
        share = torch.where(chosen >= 0, factor, 0.0).unsqueeze(1)
        out[candidates, channel // inputs] += matrix[channel // inputs, :, channel % inputs] * share
    return out.flatten(1)
