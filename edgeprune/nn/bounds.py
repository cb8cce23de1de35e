"""Sound interval bounds of a network's activations, and of how much its output changes when something inside changes.

Interval propagation in two domains. With all positions: an interval for each entry of an activation. Collapsed: one
for each channel, a hull over its positions, with which a convolution costs no more than a matrix of its channels.
Where a network tells positions apart again (a flattening, attention), the collapsed domain spreads them out by itself.

Bounds hold for the network in exact arithmetic. They are computed in the dtype of the box, or of the starts, each
operation widened by more than its own rounding error (see bounds_interval). What a float32 run adds by rounding its
own activations is not part of them. Deep networks can outgrow float32: use float64 there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from edgeprune.nn.bounds_interval import Interval, Unbounded, Value
from edgeprune.nn.bounds_linear import WEIGHTED, taps
from edgeprune.nn.bounds_walk import Bounds, Weights, changes_of, inward, outward, values_of
from edgeprune.nn.tracing import Call, Program

__all__ = ["Bounds", "Interval", "Unbounded", "activation_bounds", "consumer_impact", "delta_from"]


def activation_bounds(
    program: Program, state: Mapping[str, Tensor], box: Interval, *, collapsed: bool
) -> Bounds:
    """Bounds of every activation over a box of inputs.

    Args:
        program: the traced network. state: its state dict.
        box: (B, C, H, W), B boxes at once, float32 or float64: the dtype of all bounds.
        collapsed: one interval per channel instead of one per entry.

    Returns:
        An operator that can't be bounded makes itself and all that depends on it unbounded, nothing else.

    Raises:
        ValueError: the box does not fit the program's input.
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

    Raises:
        Unbounded: the change passes through an operator that has no bound; says which.
        ValueError: a start does not fit its call's output.
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
