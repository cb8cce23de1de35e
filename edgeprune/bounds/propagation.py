"""One walk over a traced network: bounds of every call from those before it, or of every change."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from edgeprune.bounds.difference import TIGHT, Change, Fixed, changed, held, new_of, replaced, still_of
from edgeprune.bounds.interval import Interval, NoRule, Unbounded, Value, zero
from edgeprune.bounds.linear import WEIGHTED, taps
from edgeprune.bounds.operators import computed
from edgeprune.bounds.shape_ops import Moved
from edgeprune.models import Call, Program, Ref, Weight

# These take only the shape and the kind of the first tensor that they read.
_SHAPE_ONLY = ("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "fill")


@dataclass(frozen=True)
class Bounds:
    """What is known of every call's output over a box of inputs.

    values: name of a call, or of the input -> bounds with one axis for each of the call's `shape`, batch in front.
    constants: name of a call that does not depend on the input -> its output.
    unbounded: name of a call -> why there is no bound of its output; of the calls that depend on it too.
    causes: the same as what would be raised.
    """

    values: Mapping[str, Moved]
    constants: Mapping[str, Any]
    unbounded: Mapping[str, str]
    causes: Mapping[str, Unbounded] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def intervals(self) -> dict[str, Interval]:
        """Name of a call, or of the input -> (B, ...), B in the place of the network's batch.

        Collapsed, an axis of positions has size 1: (B, C, 1, 1). Broadcast it against activations to compare.
        """
        return {n: outward(v) for n, v in self.values.items() if isinstance(v, Value)}

    def value(self, name: str, dtype: torch.dtype) -> Any:
        """The bounds of a call's output in a dtype; None when there are none, or they outgrow the dtype."""
        found = self.values.get(name)
        if isinstance(found, tuple):
            return tuple(v.to(dtype) for v in found)
        return found.to(dtype) if found else None


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


def values_of(program: Program, weights: Weights, start: Value) -> Bounds:
    """Bounds of every call's output from those of the input."""
    values: dict[str, Moved] = {program.input: start}
    constants: dict[str, Any] = {}
    causes: dict[str, Unbounded] = {}
    bounds = Bounds(values, constants, {}, causes)
    with torch.no_grad():
        for call in program.calls:
            cause = next((causes[name] for name in call.reads if name in causes), None)
            if cause is not None and call.op not in _SHAPE_ONLY:
                causes[call.name] = cause
                continue
            try:
                found = _value(program, call, weights, bounds)
            except NoRule as error:
                causes[call.name] = Unbounded(call.op, call.layer, str(error))
                continue
            target: dict[str, Any] = values if _has_bounds(found) else constants
            target[call.name] = found
    return Bounds(values, constants, {n: c.message for n, c in causes.items()}, causes)


def changes_of(
    program: Program,
    weights: tuple[Weights, Weights],
    bounds: tuple[Bounds, Bounds | None],
    starts: Mapping[str, Value],
) -> Value:
    """Bounds of the change of the output.

    A change is also no more than the difference of the ranges of the values, so those after it are followed too, but
    not where that would gain nothing.

    Args:
        bounds: of the activations before and, where known, after.
        starts: name of a call, or of the input -> by how much its output changes beyond what arrives there.
    """
    walk = _Walk(program, weights, bounds)
    walk.ranges = bounds[1] is not None or any(c.op not in TIGHT for c in program.after(frozenset(starts)))
    if program.input in starts:
        walk.by[program.input] = starts[program.input]
    last = {name: i for i, call in enumerate(program.calls) for name in call.reads}
    with torch.no_grad():
        for i, call in enumerate(program.calls):
            if walk.reaches(call):
                walk.step(call)
            if call.name in starts:
                walk.add(call.name, starts[call.name])
            for name in set(call.reads):
                if last[name] == i and name != program.output:
                    walk.forget(name)
    output = walk.by.get(program.output)
    if isinstance(output, Value):
        return output
    return zero(program.shape_of(program.output), torch.zeros((), dtype=weights[0].dtype))


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
    """Bounds of a call's output, or its output when it does not depend on the input."""

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


@dataclass
class _Walk:
    """What has changed so far: by how much, and where the values can be after it."""

    program: Program
    weights: tuple[Weights, Weights]
    bounds: tuple[Bounds, Bounds | None]
    by: dict[str, Moved] = field(default_factory=dict)
    after: dict[str, Value] = field(default_factory=dict)
    ranges: bool = True

    def reaches(self, call: Call) -> bool:
        """Whether anything that a call reads changes."""
        first, second = self.bounds
        if call.name in first.constants:
            return False
        if any(name in self.by for name in call.reads):
            return True
        if self.weights[0] is self.weights[1] or second is None:
            return False
        pairs = [(self.weights[0].given(n), self.weights[1].given(n)) for n in call.weights]
        pairs += [(first.constants[n], second.constants[n]) for n in call.reads if n in first.constants]
        return any(not torch.equal(a, b) for a, b in pairs)

    def step(self, call: Call) -> None:
        """Bounds of the change of a call's output, from its rule and from the ranges of its values."""
        args = _filled(call.args, self._operand, self._weight)
        try:
            out = changed(call, args)
            if self.ranges:
                out = self._ranged(call, args, out)
            assert out is not None
            _check_finite(out)
        except NoRule as error:
            # Where the values themselves have no bound, what stopped them says more.
            raise self.bounds[0].causes.get(call.name) or Unbounded(
                call.op, call.layer, str(error)
            ) from error
        self.by[call.name] = out

    def add(self, name: str, start: Value) -> None:
        """A change that starts here comes to what arrives."""
        arrived = self.by.get(name)
        self.by[name] = (
            Value(arrived.bounds + start.bounds, start.shape) if isinstance(arrived, Value) else start
        )
        self.after.pop(name, None)

    def forget(self, name: str) -> None:
        """Nothing reads it any more."""
        self.by.pop(name, None)
        self.after.pop(name, None)

    def _ranged(self, call: Call, args: tuple[Any, ...], out: Moved | None) -> Moved:
        old = self.bounds[0].value(call.name, self.weights[0].dtype)
        try:
            after = self._after(call, args)
        except NoRule:
            if out is None:
                raise
            return out
        if not isinstance(old, Value) or not isinstance(after, Value):
            if out is None:
                raise NoRule("only the ranges of its values bound its change, and they have no bound")
            return out
        self.after[call.name] = after
        ranged = after.bounds - old.bounds
        if out is None:
            return Value(held(ranged, still_of(args)), call.shape)
        return Value(out.bounds.meet(ranged), call.shape) if isinstance(out, Value) else out

    def _after(self, call: Call, args: tuple[Any, ...]) -> Moved | None:
        """Where the values can be after the change. Affine maps add nothing to what they were plus the change."""
        second = self.bounds[1]
        known = second.value(call.name, self.weights[0].dtype) if second else None
        if known is not None or call.op in (*WEIGHTED, "batch_norm"):
            return known
        found = computed(call, replaced(args, new_of))
        _check_finite(found)
        return found

    def _operand(self, name: str) -> Any:
        first, second = self.bounds
        dtype = self.weights[0].dtype
        if name in first.constants:
            return _fixed(first.constants[name], second.constants[name] if second else None)
        old = first.value(name, dtype)
        new = second.value(name, dtype) if second else self.after.get(name)
        by = self.by.get(name, zero(self.program.shape_of(name), torch.zeros((), dtype=dtype)))
        if not isinstance(by, tuple):
            return Change(old, by, new)
        olds, news = old or (None,) * len(by), new if isinstance(new, tuple) else (None,) * len(by)
        return tuple(Change(o, b, n) for o, b, n in zip(olds, by, news, strict=True))

    def _weight(self, name: str) -> Fixed:
        before = self.weights[0](name)
        return Fixed(before, before if self.weights[0] is self.weights[1] else self.weights[1](name))


def _fixed(before: Any, after: Any) -> Any:
    """A constant before and after; several of them where an operator gives a tuple."""
    if isinstance(before, (tuple, list)):
        afters = before if after is None else after
        return tuple(_fixed(b, a) for b, a in zip(before, afters, strict=True))
    return Fixed(before, before if after is None else after)


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
    return values_of(program, Weights(program, state, box.lo.dtype), start)


def delta_from(
    program: Program, state: Mapping[str, Tensor], bounds: Bounds, starts: Mapping[str, Interval]
) -> Interval:
    """A bound of the change of the network's output when the outputs of some calls change.

    Args:
        bounds: of the activations before the change, of one box; they make the bound tighter, and operators that are
            not Lipschitz need them.
        starts: name of a call, or of the input -> by how much its output changes, for B candidates at once:
            (B, ...) as in `Bounds.intervals`; axes of size 1 stand for every position, missing ones at the end too.
            Where a start is downstream of another one, its change is added to what arrives there.

    Returns:
        (B, K): output after minus output before, for every input in the box.
    """
    begin = {n: inward(i, program.shape_of(n), f"the start at {n}") for n, i in starts.items()}
    weights = Weights(program, state, next(iter(starts.values())).lo.dtype)
    found = changes_of(program, (weights, weights), (bounds, None), begin).full()
    batch = max(v.bounds.lo.shape[0] for v in begin.values())
    whole = Interval(*(v.expand(batch, *v.shape[1:]) for v in (found.lo, found.hi)))
    return outward(Value(whole, program.shape_of(program.output)))


def consumer_impact(
    program: Program,
    state: Mapping[str, Tensor],
    call: Call,
    positions: Sequence[Sequence[int]],
    delta: Interval,
) -> Interval:
    """What a change of some input channels of a convolution or a linear layer does to its output.

    Args:
        call: of `program`, a convolution, its transpose or a linear layer with its weight in `state`.
        positions: for each of B candidates the entries along the layer's input axis that change: one for a channel
            that a convolution reads, H · W of them where a flattened channel is read.
        delta: (B,) by how much each of them changes, anywhere in the image.

    Returns:
        (B, outputs) with an axis of size 1 for each axis of positions: a start for `delta_from`.

    Raises:
        Unbounded: the call is of another kind.
    """
    names = call.weights
    if call.op not in WEIGHTED or not names:
        raise Unbounded(call.op, call.layer, "only convolutions and linear layers have input channels")
    weight = Weights(program, state, delta.lo.dtype)(names[0])
    longest = max(len(p) for p in positions)
    # Shorter lists are filled up with a channel that changes nothing.
    index = torch.tensor([[*p, *[-1] * (longest - len(p))] for p in positions])
    found: Interval | None = None
    for part in taps(call, weight):
        center, radius = (delta.hull(0.0) if part.partial else delta).ball(longest * part.terms)
        middle, reach = (
            _columns(matrix, index, factor)
            for matrix, factor in ((part.total, center), (part.absolute, radius))
        )
        out = Interval(middle - reach, middle + reach)
        found = out if found is None else found.hull(out)
    assert found is not None
    behind = weight.ndim - 2
    ahead = len(call.shape) - 2 - behind
    size = (len(positions), *(1,) * ahead, -1, *(1,) * behind)
    return Interval(found.lo.reshape(size), found.hi.reshape(size))


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
