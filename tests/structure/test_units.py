"""Units: what is kept or removed whole, at each granularity."""

from __future__ import annotations

from dataclasses import replace

import nets
import pytest
import torch
from torch import nn

from edgeprune import plugins
from edgeprune.errors import InfeasibleBudget, UnsupportedModel
from edgeprune.methods._base import PruneTask
from edgeprune.models import costs, surgery
from edgeprune.records import InputSpec
from edgeprune.structure.allocation import Rules, shared_counts
from edgeprune.structure.groups import find_groups, provable_groups
from edgeprune.structure.units import BLOCK, drop_smallest, exactly, of_channels, of_weights

SCORERS = ("magnitude", "taylor", "uniform-random", "data-free")


def call(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return network(x)


def weight_task(name: str, granularity: str, density: float) -> tuple[nn.Module, PruneTask]:
    """A task that leaves so much of the weights."""
    network = nets.build(name)
    units = of_weights(network, granularity)
    model = costs.cost_model(network, (), nets.example())
    total = sum(units.sizes.values())
    others = model.cost({})["params"] - total
    limits = {"params": others + int(density * total)} if granularity == "weight" else {}
    images, labels = nets.example(40), torch.arange(40) % 5
    task = PruneTask(
        (), model, Rules(limits), call, images, labels, 7, InputSpec(nets.SHAPE, 5), images, weights=units
    )
    return network, task


def test_the_first_of_equal_scores_stay_and_exactly_so_many() -> None:
    scores = {"a": torch.tensor([0.5, 0.1, 0.1]), "b": torch.tensor([0.1, 0.9, 0.1])}
    kept = exactly(scores, 3, {})
    assert kept["a"].tolist() == [True, True, False]
    assert kept["b"].tolist() == [False, True, False]


def test_a_floor_is_kept_even_with_the_smallest_scores() -> None:
    scores = {"a": torch.tensor([9.0, 8.0, 7.0]), "b": torch.tensor([0.1, 0.2, 0.3])}
    kept = exactly(scores, 3, {"b": 2})
    assert kept["a"].tolist() == [True, False, False]
    assert kept["b"].tolist() == [False, True, True]


def test_exactly_so_many_more_are_dropped_and_none_comes_back() -> None:
    scores, mask = torch.tensor([3.0, 1.0, 1.0, 0.0, 1.0]), torch.tensor([True, True, True, False, True])
    assert drop_smallest(scores, mask, 2).tolist() == [True, False, False, False, True]
    assert drop_smallest(scores, mask, 0).tolist() == mask.tolist()


def test_blocks_lie_along_the_input_channels() -> None:
    network = nn.Sequential(nn.Conv2d(8, 2, 3), nn.Flatten(), nn.Linear(8, 3))
    units = of_weights(network, "2:4")
    weight = torch.arange(2 * 8 * 9).view(2, 8, 3, 3)
    found = {tuple(sorted(block)) for block in weight.flatten()[units.blocks["0.weight"]].tolist()}
    wanted = {
        tuple(weight[o, i : i + BLOCK, r, c].tolist())
        for o in range(2)
        for i in (0, 4)
        for r in range(3)
        for c in range(3)
    }
    assert found == wanted
    assert units.blocks["2.weight"].tolist() == torch.arange(24).view(6, 4).tolist()


def test_two_of_four_stay_in_every_block() -> None:
    units = of_weights(nn.Sequential(nn.Linear(8, 1)), "2:4")
    kept = units.best_of_blocks({"0.weight": torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 3.0, 2.0, 5.0])})
    assert kept["0.weight"].tolist() == [True, True, False, False, False, True, False, True]


def test_layers_that_hold_no_block_stay_dense_and_say_why() -> None:
    units = of_weights(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)), "2:4")
    assert set(units.shapes) == {"2.weight"}
    assert "3 input channels" in units.left_out["0"]


def test_a_layer_that_is_skipped_is_no_unit() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    assert set(of_weights(network, "weight", ["0"]).sizes) == {"1.weight"}
    assert set(of_weights(nets.build("residual"), "weight", ["o*", "tw?"]).sizes) == {
        "stem.0.weight", "down.0.weight", "fc.weight",
    }  # fmt: skip


def test_a_network_without_weights_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="no layer's weights"):
        of_weights(nn.Sequential(nn.ReLU()), "weight")


@pytest.mark.parametrize("name", nets.NETS)
def test_masking_channels_by_units_equals_masking_by_surgery(name: str) -> None:
    network, other = nets.build(name), nets.build(name)
    groups = provable_groups(network, find_groups(network, nets.example()), nets.example(), 0).groups
    masks = {g.name: torch.arange(g.channels) % 2 == 0 for g in groups}
    of_channels(groups).apply(network, masks)
    surgery.mask(other, groups, masks)
    named = dict(other.named_parameters())
    assert all(torch.equal(p, named[n]) for n, p in network.named_parameters())


def test_only_the_readers_are_masked_when_asked_for() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    groups = find_groups(network, torch.zeros(1, 3, 8, 8)).groups
    units = of_channels(groups)
    mask = {groups[0].name: torch.tensor([True, False, True, True])}
    units.apply(network, mask, ("consumer",))
    assert bool((network[2].weight[:, 1] == 0).all()) and bool((network[2].weight[:, 0] != 0).all())
    assert bool((network[0].weight != 0).all())


def test_the_norm_of_a_channel_is_over_all_that_it_owns() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
        network[0].bias.copy_(torch.tensor([0.0, 1.0]))
        network[2].weight.copy_(torch.tensor([[4.0, 1.0]]))
    groups = find_groups(nn.Sequential(nn.Flatten(), network), torch.zeros(1, 2, 1, 1)).groups
    units = of_channels(groups)
    whole = nn.Sequential(nn.Flatten(), network)
    assert next(iter(units.norms(whole).values())).tolist() == pytest.approx([2.5, (3 / 4) ** 0.5])


@pytest.mark.parametrize("density", [0.05, 0.37, 1.0])
@pytest.mark.parametrize("name", nets.NETS)
@pytest.mark.parametrize("method", SCORERS)
def test_every_scoring_method_keeps_exactly_the_weights_of_the_budget(
    method: str, name: str, density: float
) -> None:
    network, task = weight_task(name, "weight", density)
    masks = plugins.build("methods", method, {})(network, task)
    total = sum(task.units.sizes.values())
    assert sum(int(keep.sum()) for keep in masks.weights.values()) == int(density * total)
    assert all(int(masks.weights[n].sum()) >= floor for n, floor in task.floors().items())


@pytest.mark.parametrize("name", sorted(set(nets.NETS) - {"transposed"}))
@pytest.mark.parametrize("method", SCORERS)
def test_every_scoring_method_keeps_the_pattern(method: str, name: str) -> None:
    network, task = weight_task(name, "2:4", 0.5)
    masks = plugins.build("methods", method, {})(network, task)
    for parameter, keep in masks.weights.items():
        by_input = keep.movedim(1, -1).reshape(-1, BLOCK)
        assert bool((by_input.sum(1) == 2).all()), parameter


def test_a_network_without_a_single_block_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="a.0: 3 input channels.*fc: 6 input channels"):
        of_weights(nets.build("transposed"), "2:4")


def test_a_budget_below_the_floors_is_infeasible() -> None:
    network, task = weight_task("plain", "weight", 0.0005)
    with pytest.raises(InfeasibleBudget, match="zeroing weights"):
        plugins.build("methods", "magnitude", {})(network, task)


def test_a_pattern_that_leaves_more_than_the_budget_is_infeasible() -> None:
    network, task = weight_task("plain", "2:4", 0.5)
    task = replace(task, rules=Rules({"params": 10.0}))
    with pytest.raises(InfeasibleBudget, match="at least"):
        plugins.build("methods", "magnitude", {})(network, task)


def test_without_a_budget_everything_stays() -> None:
    network, task = weight_task("plain", "weight", 0.5)
    free = replace(task, rules=Rules({}))
    assert free.free and all(bool(m.all()) for m in free.keep(free.units.norms(network)).values())


def test_counts_are_shared_in_proportion_and_exactly() -> None:
    sizes = {"a": 100, "b": 200}
    assert shared_counts(sizes, {}, 150, {}) == {"a": 50, "b": 100}
    # b is cut twice as deep as a: 100 (1 - t/2) + 200 (1 - t) = 150 at t = 0.6.
    assert shared_counts(sizes, {"a": 0.5, "b": 1.0}, 150, {}) == {"a": 70, "b": 80}
    assert shared_counts(sizes, {"a": 0.5, "b": 1.0}, 100, {"b": 60}) == {"a": 40, "b": 60}
    found = shared_counts({"a": 7, "b": 11, "c": 3}, {"a": 0.3, "b": 0.7, "c": 0.0}, 13, {})
    assert sum(found.values()) == 13 and found["c"] == 3


def test_counts_that_the_recipe_shares_out_are_kept() -> None:
    network, task = weight_task("plain", "weight", 0.5)
    counts = shared_counts(task.units.sizes, {}, task.quota(), task.floors())
    masks = plugins.build("methods", "magnitude", {})(network, replace(task, counts=counts))
    assert {name: int(keep.sum()) for name, keep in masks.weights.items()} == counts
