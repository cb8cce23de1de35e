"""Bounds of what removing a unit changes at the layers that make or read it, and their propagation to the logits.

A merge changes the unit before the activation; a unit that is removed without a merge changes its readers' inputs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from edgeprune.bounds import Bounds, Interval, consumer_impact, delta_from
from edgeprune.methods._data_free.merging import unit_rows
from edgeprune.methods._data_free.pairing import Pair
from edgeprune.models import Call, Program, tensors
from edgeprune.records import Group, InputSpec
from edgeprune.repair import bias_of
from edgeprune.structure import follow

_NODES = 33
# They act on every entry alone and alike, so a Gaussian's mean and variance after them is an integral.
_POINTWISE = frozenset((
    "relu", "relu6", "hardtanh", "clamp", "clamp_min", "leaky_relu", "elu", "selu", "celu", "sigmoid", "hardsigmoid",
    "tanh", "silu", "hardswish", "gelu", "mish", "softplus",
))  # fmt: skip
_SAME = frozenset(("dropout", "clone", "contiguous", "alias", "detach", "_to_copy"))
_POOLS = frozenset(("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "mean", "max_pool2d_with_indices"))
_RESHAPES = frozenset(("flatten", "view", "reshape", "_unsafe_view"))


@dataclass(frozen=True)
class Moments:
    """Mean and variance of a channel's entries over images and positions, float64 (C,)."""

    mean: Tensor
    variance: Tensor


def expected_activations(program: Program, state: Mapping[str, Tensor]) -> dict[str, Moments]:
    """Name of a call -> moments of its output's channels, where the batch-norms upstream determine them."""
    found: dict[str, Moments] = {}
    for call in program.calls:
        moments = _batch_norm(call, state) if call.op == "batch_norm" else _propagated(call, found)
        if moments is not None:
            found[call.name] = moments
    return found


def _batch_norm(call: Call, state: Mapping[str, Tensor]) -> Moments | None:
    weight, bias, mean = (call.arg(n) for n in ("weight", "bias", "running_mean"))
    if mean is None or call.arg("training"):
        return None
    like = state[mean.name].double()
    deviation = state[weight.name].detach().double() if weight is not None else torch.ones_like(like)
    return Moments(
        state[bias.name].detach().double() if bias is not None else torch.zeros_like(like), deviation**2
    )


def _propagated(call: Call, found: Mapping[str, Moments]) -> Moments | None:
    known = [found.get(name) for name in call.reads]
    if not known or any(m is None for m in known):
        return None
    moments = [m for m in known if m is not None]
    first = moments[0]
    if call.op in _POINTWISE and len(moments) == 1:
        return _integral(call, first)
    if call.op in _SAME or (call.op in _POOLS and _keeps_channels(call)):
        return first
    if call.op in _RESHAPES and len(call.shape) == 2 and call.shape[1] % len(first.mean) == 0:
        times = call.shape[1] // len(first.mean)
        return Moments(first.mean.repeat_interleave(times), first.variance.repeat_interleave(times))
    if call.op == "add" and len(moments) == 2 and call.arg("alpha") == 1:
        other = moments[1]
        if len(first.mean) == len(other.mean):
            return Moments(first.mean + other.mean, first.variance + other.variance)
    if call.op == "cat" and call.args[1] in (1, -len(call.shape) + 1):
        return Moments(torch.cat([m.mean for m in moments]), torch.cat([m.variance for m in moments]))
    return None


def _keeps_channels(call: Call) -> bool:
    if call.op != "mean":
        return True
    dims = call.arg("dim") if "dim" in call.names else None
    rank = len(call.shape) if not dims or call.arg("keepdim") else len(call.shape) + len(dims)
    return bool(dims) and all(d % rank > 1 for d in dims)


def _integral(call: Call, x: Moments) -> Moments:
    """Mean and variance of f(x) for Gaussian x, by Gauss-Hermite quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(_NODES)
    z = torch.from_numpy(nodes).view(-1, 1)
    w = torch.from_numpy(weights / weights.sum()).view(-1, 1)
    values = call.run((x.mean + x.variance.sqrt() * z, *call.args[1:]))
    mean = (w * values).sum(0)
    return Moments(mean, (w * (values - mean) ** 2).sum(0))


# Candidates whose bounds are followed to the logits at a time.
BATCH = 256


@dataclass(frozen=True)
class BoundedNetwork:
    """A network with the bounds of its activations for its current weights."""

    program: Program
    network: nn.Module
    bounds: Bounds


def logit_changes(bounded: BoundedNetwork, group: Group, pairs: Sequence[Pair]) -> Interval:
    """Bounds of each candidate's change of the logits, for every input in the box: float64 (n, K)."""
    found: list[Interval] = []
    alone = any(p.keep == p.remove for p in pairs)
    means = mean_contribution(bounded.program, bounded.network, group) if alone else {}
    with torch.no_grad():
        for start in range(0, len(pairs), BATCH):
            part = pairs[start : start + BATCH]
            starts = _removals(bounded, group, part, means) if alone else _merges(bounded, group, part)
            found.append(delta_from(bounded.program, tensors(bounded.network), bounded.bounds, starts))
    return Interval(torch.cat([i.lo for i in found]).double(), torch.cat([i.hi for i in found]).double())


def always_zero(bounded: BoundedNetwork, group: Group) -> frozenset[int]:
    """Units whose readers always get 0: removing them changes nothing."""
    received = [_received(bounded.bounds, *reading) for reading in _reads(bounded.program, group)]
    zero = [(low.flatten(1) == 0).all(1) & (high.flatten(1) == 0).all(1) for low, high in received]
    dead = [frozenset(which.nonzero().flatten().tolist()) for which in zero]
    return frozenset.intersection(*dead) if dead else frozenset()


def mean_contribution(program: Program, network: nn.Module, group: Group) -> dict[str, Tensor]:
    """Reader's path -> float64 (channels of its input,): the mean of its input, to be put into its bias.

    0 where the batch-norms do not determine it, or the reader has nowhere to put it.
    """
    expected = expected_activations(program, tensors(network))
    found: dict[str, Tensor] = {}
    for call, _ in _reads(program, group):
        path = call.weights[0].rpartition(".")[0]
        size = program.shape_of(call.reads[0])[_channel_axis(call)]
        moments = expected.get(call.reads[0])
        known = moments is not None and len(moments.mean) == size and bias_of(program, network, path).free
        found[path] = (
            moments.mean if known and moments is not None else torch.zeros(size, dtype=torch.float64)
        )
    return found


def _merges(bounded: BoundedNetwork, group: Group, pairs: Sequence[Pair]) -> dict[str, Interval]:
    path = follow(bounded.program, group)
    assert not isinstance(path, str), "the group is mergeable"
    rows = unit_rows(bounded.network, group)
    keep, gone = (torch.tensor([getattr(p, side) for p in pairs]) for side in ("keep", "remove"))
    scale = torch.tensor([p.scale for p in pairs], dtype=torch.float64)
    low, high = _patch(
        _bounds_at(bounded.bounds, path.producer.reads[0]), path.producer, rows.incoming.shape[1]
    )
    difference = scale[:, None] * rows.incoming[keep] - rows.incoming[gone]
    close = _affine(difference, scale * rows.bias[keep] - rows.bias[gone], low, high)
    own = _affine(rows.incoming, rows.bias, low, high)
    apart = Interval(scale * own.lo[keep] - own.hi[gone], scale * own.hi[keep] - own.lo[gone])
    both = close.intersect(apart)
    users = bounded.program.users(path.producer.name)
    end = users[0] if len(users) == 1 and users[0].op == "batch_norm" else path.producer
    axis = _channel_axis(end)
    starts = torch.zeros(2, len(pairs), end.shape[axis], dtype=torch.float64)
    index = torch.arange(len(pairs))
    starts[0, index, gone], starts[1, index, gone] = both.lo, both.hi
    shape = [1] * len(end.shape)
    shape[0], shape[axis] = len(pairs), end.shape[axis]
    return {end.name: Interval(starts[0].reshape(shape), starts[1].reshape(shape))}


def _removals(
    bounded: BoundedNetwork, group: Group, pairs: Sequence[Pair], means: dict[str, Tensor]
) -> dict[str, Interval]:
    """A unit that is removed takes h away from each of its readers and leaves its mean: the change is mean - h."""
    starts: dict[str, Interval] = {}
    units = [p.remove for p in pairs]
    for call, positions in _reads(bounded.program, group):
        low, high = _received(bounded.bounds, call, positions)
        mean = means[call.weights[0].rpartition(".")[0]].to(low)
        left = torch.stack([mean[list(positions[u])].mean() for u in units])
        change = Interval(left - high.amax(1)[units], left - low.amin(1)[units])
        entries = [positions[u] for u in units]
        starts[call.name] = consumer_impact(bounded.program, tensors(bounded.network), call, entries, change)
    return starts


def _reads(program: Program, group: Group) -> list[tuple[Call, tuple[tuple[int, ...], ...]]]:
    return [
        (call, member.positions)
        for member in group.members if member.role == "consumer"
        for call in program.readers(member.tensor)
    ]  # fmt: skip


def _received(bounds: Bounds, call: Call, positions: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Bounds of each unit in a reader's input: two of (C, entries), units with fewer entries repeat one."""
    at = _bounds_at(bounds, call.reads[0])
    axis = _channel_axis(call)
    lo, hi = (t.movedim(axis, 0).flatten(1) for t in (at.lo, at.hi))
    most = max(len(p) for p in positions)
    index = torch.tensor([[*p, *[p[0]] * (most - len(p))] for p in positions])
    if len(lo) == 1:
        index = torch.zeros_like(index)
    return lo[index].flatten(1), hi[index].flatten(1)


def _bounds_at(bounds: Bounds, name: str) -> Interval:
    found = bounds.intervals.get(name)
    if found is None:
        raise bounds.causes[name]
    return found


def _channel_axis(call: Call) -> int:
    return len(call.shape) - 1 if call.op == "linear" else 1


def _patch(at: Interval, producer: Call, width: int) -> tuple[Tensor, Tensor]:
    axis = _channel_axis(producer)
    lo = at.lo.movedim(axis, 0).flatten(1).amin(1).double()
    hi = at.hi.movedim(axis, 0).flatten(1).amax(1).double()
    padding = producer.arg("padding") if producer.op != "linear" else "valid"
    padded = padding == "same" or (padding != "valid" and any(padding))
    if padded or producer.op.startswith("conv_transpose"):
        lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    taps = width // len(lo)
    return lo.repeat_interleave(taps), hi.repeat_interleave(taps)


def _affine(rows: Tensor, constant: Tensor, low: Tensor, high: Tensor) -> Interval:
    """Bounds of rows . x + constant over low <= x <= high, widened for rounding."""
    center, radius = rows @ ((low + high) / 2) + constant, rows.abs() @ ((high - low) / 2)
    slack = 1e-12 * (radius + rows.abs() @ ((low + high) / 2).abs() + constant.abs())
    return Interval(center - radius - slack, center + radius + slack)


def input_box(spec: InputSpec) -> Interval:
    """All normalized inputs of the bare network: float64 (1, C, H, W)."""
    channels = spec.shape[0]
    mean = torch.tensor(spec.mean or (0.0,) * channels, dtype=torch.float64)
    std = torch.tensor(spec.std or (1.0,) * channels, dtype=torch.float64)
    ends = [((end - mean) / std).reshape(1, -1, 1, 1).expand(1, *spec.shape) for end in (spec.low, spec.high)]
    return Interval(torch.minimum(*ends), torch.maximum(*ends))
