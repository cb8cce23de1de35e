"""Bounds of what a candidate changes hold for every input, are 0 for what changes nothing, and name what has none."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import nets
import programs
import pytest
import torch
from torch import Tensor, nn

from edgeprune.bounds.interval import Interval, Unbounded
from edgeprune.bounds.propagation import activation_bounds
from edgeprune.methods._data_free.impact import BoundedNetwork, always_zero, logit_changes, mean_contribution
from edgeprune.methods._data_free.merging import (
    compensate,
    is_homogeneous,
    merge,
    unit_rows,
    why_not_mergeable,
)
from edgeprune.methods._data_free.pairing import Pair, greedy_matching, pair_saliency, scaled_saliency
from edgeprune.models import tensors
from edgeprune.models.tracing import trace
from edgeprune.records import Group
from edgeprune.structure import groups

SAMPLES = 20


def scene_of(
    network: nn.Module, x: Tensor, *, collapsed: bool = True
) -> tuple[BoundedNetwork, tuple[Group, ...]]:
    """A network in the box [0, 1], and what can go of it."""
    program = trace(network, x)
    box = programs.box_of(tuple(x.shape[1:]), 0.0, 1.0)
    with torch.no_grad():
        bounds = activation_bounds(program, tensors(network), box, collapsed=collapsed)
    return BoundedNetwork(program, network, bounds), groups.find_groups(network, x).groups


def candidates(scene: BoundedNetwork, group: Group) -> list[Pair]:
    """Some merges, or where there are none some units alone."""
    if why_not_mergeable(scene.program, scene.network, group) is not None:
        return [Pair(u, u, 0.0) for u in range(0, group.channels, 3)]
    rows = unit_rows(scene.network, group)
    if is_homogeneous(scene.program, group):
        saliency, scale = scaled_saliency(rows.incoming, rows.outgoing, rows.bias)
        return greedy_matching(saliency, 4, scale=scale)
    return greedy_matching(pair_saliency(rows.incoming, rows.outgoing, rows.bias), 4)


def edited(scene: BoundedNetwork, group: Group, pair: Pair) -> nn.Module:
    """A copy in which a candidate is gone."""
    network = deepcopy(scene.network)
    if pair.keep == pair.remove:
        means = mean_contribution(scene.program, network, group)
        compensate(scene.program, network, group, [pair.remove], means)
    else:
        merge(network, group, [pair])
    return network


@pytest.mark.parametrize("name", [name for name in nets.NETS if name not in ("groupnormed", "transposed")])
def test_every_observed_change_of_the_logits_lies_in_its_bound(name: str) -> None:
    """Merges and units that go alone, as they are really done, on corners and points of the box."""
    network = programs.lively(nets.build(name)).double()
    x = programs.inputs(programs.box_of(nets.SHAPE, 0.0, 1.0), SAMPLES)
    scene, groups = scene_of(network, nets.example().double())
    with torch.no_grad():
        before = network(x)
        for group in groups:
            pairs = candidates(scene, group)
            bound = logit_changes(scene, group, pairs)
            assert bound.lo.shape == (len(pairs), 5) and bound.lo.dtype == torch.float64
            for row, pair in enumerate(pairs):
                change = edited(scene, group, pair)(x) - before
                assert programs.within(change, Interval(bound.lo[row], bound.hi[row]), before), (
                    group.name,
                    pair,
                )


def worked() -> nn.Sequential:
    """x in [0, 1]^2, W1 = [[1, -2], [.5, .5], [-1, -1]], b1 = [0, -.25, -.5], W2 = [[1, 2, -1], [-1, .5, 3]]."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    with torch.no_grad():
        network[1].weight.copy_(torch.tensor([[1.0, -2], [0.5, 0.5], [-1, -1]]))
        network[1].bias.copy_(torch.tensor([0, -0.25, -0.5]))
        network[3].weight.copy_(torch.tensor([[1.0, 2, -1], [-1, 0.5, 3]]))
        network[3].bias.copy_(torch.tensor([0.1, -0.1]))
    return network.eval()


@pytest.mark.parametrize("collapsed", [False, True])
def test_the_bound_of_a_merge_is_as_computed_by_hand(collapsed: bool) -> None:
    """Merging 1 into 0: u0 - u1 = .5 x1 - 2.5 x2 + .25 in [-2.25, .75], apart in [-2.75, 1.25].

    Pre-activation 1 moves by [-2.25, .75] from [-.25, .75]: behind the ReLU by [-.75, .75], times (2, .5).
    """
    scene, (group,) = scene_of(worked(), torch.zeros(1, 1, 1, 2).double(), collapsed=collapsed)
    found = logit_changes(scene, group, [Pair(0, 1, 0.0)])
    expected = torch.tensor([[1.5, 0.375]]).double()
    torch.testing.assert_close(found.lo, -expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(found.hi, expected, atol=1e-9, rtol=0)
    assert always_zero(scene, group) == {2}, "its pre-activation is at most -.5"


def test_a_unit_that_goes_alone_takes_its_interval_away() -> None:
    """h1 in [0, .75] and nothing is left: the logits move by [-.75, 0] times (2, .5); unit 2 moves none."""
    scene, (group,) = scene_of(worked(), torch.zeros(1, 1, 1, 2).double())
    found = logit_changes(scene, group, [Pair(1, 1, 0.0), Pair(2, 2, 0.0)])
    torch.testing.assert_close(found.lo, torch.tensor([[-1.5, -0.375], [0, 0]]).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(found.hi, torch.zeros(2, 2).double(), atol=1e-9, rtol=0)


@pytest.mark.parametrize("factor", [1.0, 2.5])
def test_copies_and_multiples_are_known_to_change_nothing(factor: float) -> None:
    network = worked()
    with torch.no_grad():
        network[1].weight[1] = network[1].weight[0] * factor
        network[1].bias[1] = network[1].bias[0] * factor
    scene, (group,) = scene_of(network, torch.zeros(1, 1, 1, 2).double())
    found = logit_changes(scene, group, [Pair(0, 1, 0.0, factor)])
    assert float(found.hi.abs().max()) == float(found.lo.abs().max()) == 0.0


def test_more_candidates_than_go_at_a_time_are_bounded_one_like_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scene, groups = scene_of(nets.build("plain"), nets.example())
    pairs = candidates(scene, groups[0])
    whole = logit_changes(scene, groups[0], pairs)
    monkeypatch.setattr("edgeprune.methods._data_free.impact.BATCH", 3)
    parts = logit_changes(scene, groups[0], pairs)
    torch.testing.assert_close((parts.lo, parts.hi), (whole.lo, whole.hi))


def test_a_channel_that_a_relu_always_closes_is_dead_and_what_reads_nothing_is_not() -> None:
    network = nets.build("plain")
    with torch.no_grad():
        network.a[1].weight[3], network.a[1].bias[3] = 0, -1
        network.b[1].weight[7], network.b[1].bias[7] = 0, -1
    scene, (first, second) = scene_of(network, nets.example())
    assert (always_zero(scene, first), always_zero(scene, second)) == ({3}, {7})
    unread = replace(first, members=tuple(m for m in first.members if m.role != "consumer"))
    assert always_zero(scene, unread) == frozenset()


def test_the_means_that_are_left_behind_are_those_of_batch_norm() -> None:
    """Of a ReLU over a Gaussian; 0 where a reader has no bias or nothing is known of what it reads."""
    network = nets.build("plain")
    with torch.no_grad():
        network.a[1].weight.fill_(1.0)
        network.a[1].bias.zero_()
    scene, (first, second) = scene_of(network, nets.example())
    means = mean_contribution(scene.program, network, first)
    half = torch.full((8,), 1 / (2 * torch.pi) ** 0.5, dtype=torch.float64)
    torch.testing.assert_close(means["b.0"], half, atol=0.02, rtol=0)
    assert mean_contribution(scene.program, network, second)["fc"].shape == (12 * 16,)
    bare = worked()
    scene, (group,) = scene_of(bare, torch.zeros(1, 1, 1, 2).double())
    assert mean_contribution(scene.program, bare, group)["3"].tolist() == [0.0] * 3


class Unknown(nn.Module):
    """A network that sorts: no bound passes that."""

    def __init__(self, early: bool) -> None:
        super().__init__()
        self.a, self.b, self.fc, self.early = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3), early

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        x = torch.relu(self.a(torch.cumsum(x, 1) if self.early else x))
        x = torch.relu(self.b(x))
        return self.fc(x if self.early else torch.cumsum(x, 1))


@pytest.mark.parametrize("early", [True, False])
def test_what_has_no_bound_is_named_wherever_it_is(early: bool) -> None:
    network = Unknown(early).eval()
    scene, groups = scene_of(network, torch.zeros(1, 1, 2, 2))
    group = {g.name: g for g in groups}["a"]
    with pytest.raises(Unbounded, match="cumsum can't be bounded"):
        logit_changes(scene, group, [Pair(0, 1, 0.0)])
    if early:
        with pytest.raises(Unbounded, match="cumsum"):
            always_zero(scene, group)
