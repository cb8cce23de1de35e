"""Walks over a traced network: bounds of every call from those before it, and of every change."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from edgeprune.bounds.interval import Interval, NoRule, Unbounded, Value, zero
from edgeprune.bounds.linear import WEIGHTED, channel_matrices
from edgeprune.bounds.operators import Change, changed, computed
from edgeprune.bounds.shape_ops import Moved
from edgeprune.models import Call, Program, Ref, Weight

# These take only the shape and the kind of the first tensor that they read.
_SHAPE_ONLY = ("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "fill")


@dataclass(frozen=True)
class Bounds:
    """What is known of every call's output over a box of inputs.

    values: name of a call, or of the input -> bounds with one axis for each of the call's `shape`, batch in front.
    constants: name of a call that does not depend on the input -> its output.
    causes: name of a call -> why there is no bound of its output; of the calls that depend on it too.
    """

    values: dict[str, Moved]
    constants: dict[str, Any]
    causes: dict[str, Unbounded]

    @cached_property
    def intervals(self) -> dict[str, Interval]:
        """Name of a call, or of the input -> (B, ...), B in the place of the network's batch.

        Collapsed, an axis of positions has size 1: (B, C, 1, 1). Broadcast it against activations to compare.
        """
        return {n: outward(v) for n, v in self.values.items() if isinstance(v, Value)}


class Weights:
    """The tensors of a network by name, in the dtype of the bounds; rounded to it, where it is a coarser one."""

    def __init__(self, program: Program, state: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._state = state
        self._constants = program.constants

    def __call__(self, name: str) -> Tensor:
        """A tensor in the dtype of the bounds."""
        return self.cast(self.given(name))

    def given(self, name: str) -> Tensor:
        """A tensor by its name, in its own dtype."""
        return (self._state[name] if name in self._state else self._constants[name]).detach()

    def cast(self, value: Any) -> Any:
        """A tensor of floats in the dtype of the bounds; anything else as it is."""
        floats = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(self.dtype) if floats else value


def inward(given: Interval, shape: tuple[int, ...], what: str) -> Value:
    """Bounds (B, ...) as a value with an axis for each axis of a tensor, B in front."""
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


def outward(value: Value) -> Interval:
    """Bounds with B in the place of the batch axis that a network has in front."""
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


def _has_bounds(found: Any) -> bool:
    return isinstance(found, Value) or (isinstance(found, tuple) and isinstance(found[0], Value))


def _check_finite(found: Moved) -> None:
    parts = found if isinstance(found, tuple) else (found,)
    if not all(part.bounds.finite for part in parts):
        raise NoRule(f"its bounds outgrow {parts[0].bounds.lo.dtype}")


def activation_bounds(
    program: Program, state: Mapping[str, Tensor], box: Interval, *, collapsed: bool
) -> Bounds:
    """Bounds of every activation over a box of inputs.

    Args:
        box: (B, C, H, W), B boxes at once, float32 or float64: the dtype of all bounds.
        collapsed: one interval per channel instead of one per entry.

    Returns:
        An operator that can't be bounded makes itself and all that depends on it unbounded, nothing else.
    """
    start = inward(box, program.input_shape, "the box")
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
            target: dict[str, Any] = bounds.values if _has_bounds(found) else bounds.constants
            target[call.name] = found
    return bounds


def delta_from(
    program: Program, state: Mapping[str, Tensor], bounds: Bounds, starts: Mapping[str, Interval]
) -> Interval:
    """A bound of the change of the network's output when the outputs of some calls change.

    Args:
        starts: name of a call, or of the input -> by how much its output changes, for B candidates at once:
            (B, ...) as in `Bounds.intervals`, in their dtype; axes of size 1 stand for every position, missing ones at
            the end too. Where a start is downstream of another one, its change is added to what arrives there.

    Raises:
        Unbounded: an operator on the way has no bound.
    """
    begin = {n: inward(i, program.shape_of(n), f"the start at {n}") for n, i in starts.items()}
    like = next(iter(starts.values())).lo
    weights = Weights(program, state, like.dtype)
    changes: dict[str, Moved] = {n: v for n, v in begin.items() if n == program.input}
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
    return outward(Value(whole, program.shape_of(program.output)))


def _change(
    program: Program, call: Call, weights: Weights, bounds: Bounds, changes: Mapping[str, Moved]
) -> Moved:
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
    """What a change of some input channels of a convolution or a linear layer does to its output.

    Args:
        positions: for each of B candidates the entries along the layer's input axis that change: one for a channel
            that a convolution reads, H · W of them where a flattened channel is read.

    Returns:
        (B, outputs) with an axis of size 1 for each axis of positions: a start for `delta_from`.

    Raises:
        Unbounded: the call is of another kind.
    """
    names = call.weights
    if call.op not in WEIGHTED or not names:
        raise Unbounded(call.op, call.layer, "only convolutions and linear layers have input channels")
    weight = Weights(program, state, delta.lo.dtype)(names[0])
    layer = channel_matrices(call, weight)
    longest = max(len(p) for p in positions)
    # Shorter lists are filled up with a channel that changes nothing.
    index = torch.tensor([[*p, *[-1] * (longest - len(p))] for p in positions])
    center, radius = (delta.hull(0.0) if layer.padded else delta).ball(longest * layer.terms)
    middle, reach = _columns(layer.total, index, center), _columns(layer.absolute, index, radius)
    behind = weight.ndim - 2
    size = (len(positions), *(1,) * (len(call.shape) - 2 - behind), -1, *(1,) * behind)
    return Interval((middle - reach).reshape(size), (middle + reach).reshape(size))


def _columns(matrix: Tensor, index: Tensor, factor: Tensor) -> Tensor:
    """Sums of columns times a factor per candidate: (B, groups · outputs).

    Args:
        matrix: (groups, outputs, inputs) of each group. index: (B, n) input channels, -1 for none. factor: (B,).
    """
    groups, outputs, inputs = matrix.shape
    out = matrix.new_zeros(len(index), groups, outputs)
    candidates = torch.arange(len(index))
    for chosen in index.T:
        channel = chosen.clamp(min=0)
        share = torch.where(chosen >= 0, factor, 0.0).unsqueeze(1)
        out[candidates, channel // inputs] += matrix[channel // inputs, :, channel % inputs] * share
    return out.flatten(1)
