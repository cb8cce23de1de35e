"""What taking a unit out changes where it begins: bounds at the layers that make or read it, to follow to the logits.

A merge changes the unit's place in front of the activation; a unit that goes alone changes what its readers get.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgeprune.nn.bounds import Bounds, Interval, consumer_impact, delta_from
from edgeprune.nn.bounds_linear import TRANSPOSED
from edgeprune.nn.expectations import expectations
from edgeprune.nn.merging import dead_units, unit_rows
from edgeprune.nn.pairs import Pair
from edgeprune.nn.paths import follow
from edgeprune.nn.readers import bias_of, tensors_of
from edgeprune.nn.tracing import Call, Program
from edgeprune.records import Group

# Candidates whose bounds are followed to the logits at a time.
BATCH = 256


@dataclass(frozen=True)
class Scene:
    """A network at one moment: its program, its weights as they are now, the bounds of its activations."""

    program: Program
    network: nn.Module
    bounds: Bounds


def logit_changes(scene: Scene, group: Group, pairs: Sequence[Pair]) -> Interval:
    """Bounds of what each candidate changes in the logits, for every input in the box: float64 (n, K).

    Args:
        pairs: merges, or units that go alone (keep equal to remove) and leave their mean; all of one kind.

    Raises:
        Unbounded: an operator before or behind the group has no bound; says which.
    """
    found: list[Interval] = []
    alone = any(p.keep == p.remove for p in pairs)
    means = left_behind(scene.program, scene.network, group) if alone else {}
    with torch.no_grad():
        for start in range(0, len(pairs), BATCH):
            part = pairs[start : start + BATCH]
            starts = _removals(scene, group, part, means) if alone else _merges(scene, group, part)
            found.append(delta_from(scene.program, tensors_of(scene.network), scene.bounds, starts))
    return Interval(torch.cat([i.lo for i in found]).double(), torch.cat([i.hi for i in found]).double())


def always_zero(scene: Scene, group: Group) -> frozenset[int]:
    """Units of which every reader gets 0 whatever the input: they can go and nothing changes.

    Raises:
        Unbounded: what a reader gets has no bound.
    """
    received = [_received(scene.bounds, *reading) for reading in _reads(scene.program, group)]
    dead = [frozenset(dead_units(low, high)[0]) for low, high in received]
    return frozenset.intersection(*dead) if dead else frozenset()


def left_behind(program: Program, network: nn.Module, group: Group) -> dict[str, Tensor]:
    """Reader's path -> float64 (channels of its input,): the mean of what it gets, to be put into its bias.

    The means are those that batch-norms remember; 0 where none says them, or the reader has nowhere to put them.
    """
    expected = expectations(program, tensors_of(network))
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


def _merges(scene: Scene, group: Group, pairs: Sequence[Pair]) -> dict[str, Interval]:
    """Merging r into s puts scale * u_s where u_r was, in front of the activation.

    The difference of the two rows, bounded over the layer's inputs, is much tighter than that of their bounds, and
    0 for duplicates; both hold, so what lies in both does.
    """
    path = follow(scene.program, group)
    assert not isinstance(path, str), "the group is mergeable"
    rows = unit_rows(scene.network, group)
    keep, gone = (torch.tensor([getattr(p, side) for p in pairs]) for side in ("keep", "remove"))
    scale = torch.tensor([p.scale for p in pairs], dtype=torch.float64)
    low, high = _patch(
        _bounds_at(scene.bounds, path.producer.reads[0]), path.producer, rows.incoming.shape[1]
    )
    difference = scale[:, None] * rows.incoming[keep] - rows.incoming[gone]
    close = _affine(difference, scale * rows.bias[keep] - rows.bias[gone], low, high)
    own = _affine(rows.incoming, rows.bias, low, high)
    apart = Interval(scale * own.lo[keep] - own.hi[gone], scale * own.hi[keep] - own.lo[gone])
    both = close.meet(apart)
    end = _behind_norm(scene.program, path.producer)
    axis = _channel_axis(end)
    starts = torch.zeros(2, len(pairs), end.shape[axis], dtype=torch.float64)
    index = torch.arange(len(pairs))
    starts[0, index, gone], starts[1, index, gone] = both.lo, both.hi
    shape = [1] * len(end.shape)
    shape[0], shape[axis] = len(pairs), end.shape[axis]
    return {end.name: Interval(starts[0].reshape(shape), starts[1].reshape(shape))}


def _removals(
    scene: Scene, group: Group, pairs: Sequence[Pair], means: dict[str, Tensor]
) -> dict[str, Interval]:
    """A unit that goes alone takes h away from each of its readers and leaves its mean: the change is mean - h."""
    starts: dict[str, Interval] = {}
    units = [p.remove for p in pairs]
    for call, positions in _reads(scene.program, group):
        low, high = _received(scene.bounds, call, positions)
        mean = means[call.weights[0].rpartition(".")[0]].to(low)
        left = torch.stack([mean[list(positions[u])].mean() for u in units])
        change = Interval(left - high.amax(1)[units], left - low.amin(1)[units])
        entries = [positions[u] for u in units]
        starts[call.name] = consumer_impact(scene.program, tensors_of(scene.network), call, entries, change)
    return starts


def _reads(program: Program, group: Group) -> list[tuple[Call, tuple[tuple[int, ...], ...]]]:
    """The calls that read the group's units, and the input entries of each unit."""
    return [
        (call, member.positions)
        for member in group.members if member.role == "consumer"
        for call in program.readers(member.tensor)
    ]  # fmt: skip


def _received(bounds: Bounds, call: Call, positions: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Bounds of what a reader gets of each unit: two of (C, entries), units with fewer entries repeat one."""
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
    """The axis of a layer's channels, of its input and of its output."""
    return len(call.shape) - 1 if call.op == "linear" else 1


def _behind_norm(program: Program, producer: Call) -> Call:
    users = program.users(producer.name)
    return users[0] if len(users) == 1 and users[0].op == "batch_norm" else producer


def _patch(at: Interval, producer: Call, width: int) -> tuple[Tensor, Tensor]:
    """The bounds of each entry of a patch that a layer multiplies with its rows: two of float64 (F,)."""
    axis = _channel_axis(producer)
    lo = at.lo.movedim(axis, 0).flatten(1).amin(1).double()
    hi = at.hi.movedim(axis, 0).flatten(1).amax(1).double()
    if producer.op != "linear" and (producer.op in TRANSPOSED or _is_padded(producer)):
        lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    taps = width // len(lo)
    return lo.repeat_interleave(taps), hi.repeat_interleave(taps)


def _is_padded(producer: Call) -> bool:
    padding = producer.arg("padding")
    return padding == "same" or (padding != "valid" and any(padding))


def _affine(rows: Tensor, constant: Tensor, low: Tensor, high: Tensor) -> Interval:
    """Bounds of rows . x + constant over low <= x <= high, widened for rounding."""
    center, radius = rows @ ((low + high) / 2) + constant, rows.abs() @ ((high - low) / 2)
    slack = 1e-12 * (radius + rows.abs() @ ((low + high) / 2).abs() + constant.abs())
    return Interval(center - radius - slack, center + radius + slack)
