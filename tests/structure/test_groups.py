"""Property number one: cutting a group gives the same outputs as masking it, on networks of every kind."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import nets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from edgeprune.errors import ModelError, UnsupportedModel
from edgeprune.models import costs, surgery
from edgeprune.records import Group, Plan
from edgeprune.structure import groups

EXPECTED = {
    "plain": {"a.0": 8, "b.0": 12},
    "residual": {"stem.0": 8, "one.0": 16, "two": 8},
    "depthwise": {"stem.0": 8, "up.0": 24, "squeeze": 6},
    "grouped": {"a.0": 4, "b.0": 6, "c.0": 8},
    "concat": {"a.0": 6, "b.0": 10, "c.0": 8},
    "split": {"a.0": 6, "left.0": 8, "right.0": 8, "c.0": 8},
    "groupnormed": {"a": 4, "b": 8},
    "transposed": {"a.0": 8, "up": 6},
}


def groups_of(name: str, seed: int = 0) -> tuple[nn.Module, tuple[Group, ...]]:
    network = nets.build(name, seed)
    found = groups.find_groups(network, nets.example())
    return network, groups.provable_groups(network, found, nets.example(), 0).groups


@pytest.mark.parametrize("name", nets.NETS)
def test_every_inner_channel_is_in_one_group_and_the_outputs_in_none(name: str) -> None:
    _, groups = groups_of(name)
    assert {g.name: g.channels for g in groups} == EXPECTED[name]
    assert not any(m.tensor == "fc.weight" and m.axis == 0 for g in groups for m in g.members)


@pytest.mark.parametrize("name", nets.NETS)
@given(seed=st.integers(0, 10**6), data=st.data())
@settings(max_examples=8)
def test_cutting_equals_masking(name: str, seed: int, data: st.DataObject) -> None:
    network, groups = groups_of(name, seed % 5)
    masks = {}
    for group in groups:
        keep = torch.tensor(
            data.draw(st.lists(st.booleans(), min_size=group.channels, max_size=group.channels))
        )
        keep[seed % group.channels] = True
        masks[group.name] = keep
    masked, small = deepcopy(network).double(), deepcopy(network).double()
    surgery.mask(masked, groups, masks)
    surgery.cut(small, surgery.removed_positions(groups, masks))
    x = nets.example(3, seed).double()
    torch.testing.assert_close(small(x), masked(x), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", nets.NETS)
def test_the_cut_network_trains_and_its_layers_know_their_sizes(name: str) -> None:
    network, groups = groups_of(name)
    masks = {g.name: torch.arange(g.channels) % 2 == 0 for g in groups}
    surgery.cut(network, surgery.removed_positions(groups, masks))
    network.train()
    network(nets.example(4)).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in network.parameters())
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels // module.groups)
        if isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)


def test_masking_only_the_convolution_is_not_the_same_because_the_shift_leaks() -> None:
    network, groups = groups_of("residual")
    masks = {"one.0": torch.arange(16) < 8}
    small, half_masked = deepcopy(network), deepcopy(network)
    surgery.cut(small, surgery.removed_positions(groups, masks))
    half_masked.one[0].weight.data[8:] = 0
    assert (small(nets.example()) - half_masked(nets.example())).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["plain", "residual", "depthwise", "concat", "split"])
def test_the_proof_catches_a_consumer_whose_positions_are_shifted(name: str) -> None:
    network, groups = groups_of(name)
    group = groups[0]
    wrong = []
    for member in group.members:
        shifted = (
            (*member.positions[1:], member.positions[0]) if member.role == "consumer" else member.positions
        )
        wrong.append(replace(member, positions=shifted))
    masks = {group.name: torch.arange(group.channels) % 2 == 0}
    assert surgery.proof_failure(network, groups, masks, nets.example()) is None
    assert (
        surgery.proof_failure(network, (replace(group, members=tuple(wrong)),), masks, nets.example())
        is not None
    )


def test_a_wrong_group_is_left_out_by_name_and_the_others_stay() -> None:
    network = nets.build("plain")
    found = groups.find_groups(network, nets.example())
    first = found.groups[0]
    broken = replace(first, members=tuple(m for m in first.members if m.role != "consumer"))
    proven = groups.provable_groups(
        network, groups.Graph((broken, *found.groups[1:]), found.left_out), nets.example(), 0
    )
    assert [g.name for g in proven.groups] == ["b.0"]
    assert "does not run without these channels" in proven.left_out["a.0"]


def test_a_silent_branch_does_not_hide_a_wrong_cut() -> None:
    """A residual branch that ends in a scale of zero answers nothing, whatever is cut inside it."""
    network = nets.build("residual")
    nn.init.zeros_(network.bn.weight)
    nn.init.zeros_(network.bn.bias)
    found = groups.find_groups(network, nets.example())
    inner = next(g for g in found.groups if g.name == "one.0")
    wrong = tuple(
        replace(m, positions=(*m.positions[1:], m.positions[0])) if m.role == "consumer" else m
        for m in inner.members
    )
    with pytest.raises(UnsupportedModel, match="no channel of this network can be removed"):
        groups.provable_groups(network, groups.Graph((replace(inner, members=wrong),), {}), nets.example(), 0)


class NormedTogether(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.hidden, self.fc = (
            nn.Linear(6, 8),
            nn.LayerNorm(8),
            nn.Linear(8, 12),
            nn.Linear(12, 5),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.hidden(self.norm(self.a(x)))))


def test_channels_under_a_layer_norm_stay_and_the_reason_names_it() -> None:
    network = NormedTogether().eval()
    found = groups.find_groups(network, torch.rand(2, 6))
    assert [g.name for g in found.groups] == ["hidden"]
    assert "norm normalizes over all of its channels" in found.left_out["a"]


def test_skipped_layers_stay() -> None:
    found = groups.find_groups(nets.build("plain"), nets.example(), ["a.*"])
    assert [g.name for g in found.groups] == ["b.0"]
    assert found.left_out["a.0"] == "skipped by request ('a.*')"


def test_a_network_without_a_traceable_graph_is_refused_by_name() -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x.mean((2, 3))).detach()

    with pytest.raises(UnsupportedModel, match="does not take part in the output"):
        network = Detached()
        groups.provable_groups(network, groups.find_groups(network, nets.example()), nets.example(), 0)


@pytest.mark.parametrize("name", nets.NETS)
def test_the_cost_model_agrees_with_counting_the_cut_network(name: str) -> None:
    network, groups = groups_of(name)
    model = costs.cost_model(network, groups, nets.example())
    everything = sum(p.numel() for p in network.parameters())
    assert model.cost({}) == {"macs": costs.total_macs(network, nets.example()), "params": everything}
    masks = {g.name: torch.arange(g.channels) < max(1, g.channels // 3) for g in groups}
    predicted = model.cost({g: int(k.sum()) for g, k in masks.items()})
    surgery.cut(network, surgery.removed_positions(groups, masks))
    assert predicted["macs"] == pytest.approx(costs.total_macs(network, nets.example()))
    assert predicted["params"] == sum(p.numel() for p in network.parameters())


def test_macs_of_a_convolution_and_a_linear_layer_are_as_computed_by_hand() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 64, 5))
    rows = {r.name: r.macs for r in costs.layer_costs(network, nets.example(2))}
    assert rows == {"0": 64 * 4 * 3 * 9, "2": 256 * 5}
    assert costs.total_macs(network, nets.example(2)) == 64 * 4 * 27 + 1280


def test_a_plan_replays_on_a_fresh_network_without_tracing() -> None:
    network, groups = groups_of("depthwise")
    masks = {g.name: torch.arange(g.channels) % 3 > 0 for g in groups}
    tensors = surgery.removed_positions(groups, masks)
    small = deepcopy(network)
    plan = Plan({}, tensors, surgery.cut(small, tensors), {}, 0, 0, 0, 0)
    fresh = nets.build("depthwise", 3)
    surgery.replay(fresh, plan)
    fresh.load_state_dict(small.state_dict(), strict=True)
    torch.testing.assert_close(fresh(nets.example()), small(nets.example()), rtol=0, atol=0)


def test_a_plan_for_another_network_is_refused() -> None:
    _, groups = groups_of("plain")
    tensors = surgery.removed_positions(groups, {"a.0": torch.arange(8) < 4})
    with pytest.raises(ModelError, match="does not have"):
        surgery.cut(nets.build("residual"), tensors)
    narrow = nets.build("plain")
    surgery.cut(narrow, tensors)
    with pytest.raises(ModelError, match="does not fit"):
        surgery.cut(narrow, tensors)
