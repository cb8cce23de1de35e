"""Rewiring: exact budgets, worked examples, and the rule by which channels are bought."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nets import NETS, build, example
from torch import Tensor

from edgeprune.methods._dnr.rewiring import (
    ChannelBudget,
    Rewired,
    fill,
    largest_remainder,
    normalized,
    pruning_rate,
    rewire,
    rewire_blocks,
    rewire_channels,
)
from edgeprune.models.costs import cost_model
from edgeprune.structure.allocation import levels
from edgeprune.structure.groups import find_groups

Tensors = dict[str, Tensor]


def first(n: int, k: int) -> Tensor:
    """A mask of n with the first k active."""
    return torch.arange(n) < k


def random(names: dict[str, int], seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(n, generator=generator) for name, n in names.items()}


def counts(masks: Tensors) -> dict[str, int]:
    return {name: int(m.sum()) for name, m in masks.items()}


# The pruning rate


def test_the_rate_falls_linearly_and_is_almost_nothing_in_the_end() -> None:
    found = [pruning_rate(0.5, epoch, 200) for epoch in (0, 1, 50, 100, 199)]
    assert found == pytest.approx([0.5, 0.4975, 0.375, 0.25, 0.0025], abs=1e-12)
    assert pruning_rate(0.5, 200, 200) == 0
    assert pruning_rate(0.5, 260, 200) == 0


# Largest remainders


def test_shares_become_whole_numbers_with_the_exact_total() -> None:
    assert largest_remainder([0.04, 0.01, 0.05], 50, [95, 380, 475]) == [20, 5, 25]
    assert largest_remainder([100, 400, 500], 100, [100, 400, 500]) == [10, 40, 50]


def test_what_a_full_layer_can_not_take_goes_to_the_others() -> None:
    assert largest_remainder([0.9, 0.1], 25, [7, 380]) == [7, 18]
    assert largest_remainder([0.6, 0.3, 0.1], 100, [10, 20, 200]) == [10, 20, 70]


def test_equal_remainders_go_to_the_first() -> None:
    assert largest_remainder([1, 1, 1], 4, [9, 9, 9]) == [2, 1, 1]
    assert largest_remainder([0.1, 0.1, 0.1], 5, [9, 9, 9]) == [2, 2, 1]


def test_shares_that_are_all_zero_count_as_the_caps() -> None:
    assert largest_remainder([0, 0], 30, [20, 40]) == [10, 20]
    assert largest_remainder([5, 0, 0], 16, [10, 4, 8]) == [10, 2, 4]


def test_a_floor_is_kept_and_the_others_share_the_rest() -> None:
    assert largest_remainder([9, 1, 0], 20, [50, 50, 50], [0, 0, 5]) == [14, 1, 5]


def test_nothing_to_share_out_gives_nothing() -> None:
    assert largest_remainder([1, 2], 0, [3, 3]) == [0, 0]
    assert largest_remainder([], 0, []) == []


@pytest.mark.parametrize(
    ("shares", "total", "caps", "floors"),
    [
        ([1, -1], 1, [2, 2], []),
        ([1, math.nan], 1, [2, 2], []),
        ([1, 1], 5, [2, 2], []),
        ([1, 1], 1, [2, 2], [1, 1]),
    ],
)
def test_what_has_no_solution_is_refused(
    shares: list[float], total: int, caps: list[int], floors: list[int]
) -> None:
    with pytest.raises(ValueError, match=r"shares|shared out"):
        largest_remainder(shares, total, caps, floors)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[float], int, list[int], list[int]]:
    caps = draw(st.lists(st.integers(0, 60), min_size=1, max_size=8))
    floors = [draw(st.integers(0, cap)) for cap in caps]
    shares = [draw(st.floats(0, 1e6)) for _ in caps]
    return shares, draw(st.integers(sum(floors), sum(caps))), caps, floors


@given(problems())
def test_the_total_is_exact_and_every_bound_holds(
    problem: tuple[list[float], int, list[int], list[int]],
) -> None:
    shares, total, caps, floors = problem
    found = largest_remainder(shares, total, caps, floors)
    assert sum(found) == total
    assert all(low <= n <= high for n, low, high in zip(found, floors, caps, strict=True))


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=8), st.integers(0, 100))
def test_within_bounds_nobody_is_further_than_one_from_its_quota(shares: list[int], total: int) -> None:
    found = largest_remainder(shares, total, [1000] * len(shares))
    for n, share in zip(found, shares, strict=True):
        assert abs(n - total * share / sum(shares)) < 1


# Normalized momentum


def test_momentum_is_normalized_over_layers() -> None:
    assert normalized({"a": 0.04, "b": 0.01, "c": 0.05}, {"a": 1, "b": 1, "c": 1}) == pytest.approx(
        {"a": 0.4, "b": 0.1, "c": 0.5}
    )


@pytest.mark.parametrize(
    "means", [{"a": 0.0, "b": 0.0}, {"a": math.nan, "b": 1.0}, {"a": math.inf, "b": 1.0}]
)
def test_layers_share_by_size_where_the_momentum_says_nothing(means: dict[str, float]) -> None:
    assert normalized(means, {"a": 100, "b": 300}) == {"a": 0.25, "b": 0.75}


# Single weights


def worked() -> Rewired:
    sizes = {"a": 100, "b": 400, "c": 500}
    masks = {name: first(n, n // 10) for name, n in sizes.items()}
    momenta = {name: torch.full((sizes[name],), m) for name, m in (("a", 0.04), ("b", -0.01), ("c", 0.05))}
    return rewire(masks, random(sizes, 0), momenta, 0.5)


def test_the_worked_example_of_a_rewiring() -> None:
    found = worked()
    assert found.removed == {"a": 5, "b": 20, "c": 25}
    assert found.shares == pytest.approx({"a": 0.4, "b": 0.1, "c": 0.5})
    assert found.grown == {"a": 20, "b": 5, "c": 25}
    assert counts(found.masks) == {"a": 25, "b": 25, "c": 50}


def test_the_worked_example_with_a_full_layer() -> None:
    masks = {"a": first(12, 10), "b": first(400, 40)}
    momenta = {"a": torch.full((12,), 0.9), "b": torch.full((400,), 0.1)}
    found = rewire(masks, random({"a": 12, "b": 400}, 0), momenta, 0.5)
    assert found.removed == {"a": 5, "b": 20}
    assert found.grown == {"a": 7, "b": 18}
    assert counts(found.masks) == {"a": 12, "b": 38}


def test_the_smallest_weights_go_and_the_largest_momenta_come() -> None:
    weights = torch.tensor([[0.5, -0.1, 0.3], [0.0, 0.0, 0.0]])
    momenta = torch.tensor([[9.0, 0.0, 0.0], [1.0, -3.0, 2.0]])
    found = rewire(
        {"w": torch.tensor([True, True, True, False, False, False])}, {"w": weights}, {"w": momenta}, 0.67
    )
    assert found.stayed["w"].tolist() == [True, False, False, False, False, False]
    assert found.masks["w"].tolist() == [True, False, False, False, True, True]


def test_a_weight_that_was_just_removed_may_come_back() -> None:
    masks = {"w": torch.tensor([True, True, False])}
    found = rewire(masks, {"w": torch.tensor([1.0, 0.1, 0.0])}, {"w": torch.tensor([0.0, 5.0, 1.0])}, 0.5)
    assert found.stayed["w"].tolist() == [True, False, False]
    assert found.masks["w"].tolist() == [True, True, False]


def test_of_equal_weights_and_momenta_the_first_are_taken() -> None:
    masks = {"w": first(8, 4)}
    found = rewire(masks, {"w": torch.ones(8)}, {"w": torch.ones(8)}, 0.5)
    assert found.stayed["w"].tolist() == [False, False, True, True, False, False, False, False]
    assert found.masks["w"].tolist() == [True, True, True, True, False, False, False, False]


def test_numbers_are_counted_in_row_major_order_however_they_lie_in_memory() -> None:
    weights = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    momenta = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(2))
    mask = {"w": torch.rand(48, generator=torch.Generator().manual_seed(3)) < 0.5}
    plain = rewire(mask, {"w": weights}, {"w": momenta}, 0.5)
    last = {"memory_format": torch.channels_last}
    moved = rewire(mask, {"w": weights.contiguous(**last)}, {"w": momenta.contiguous(**last)}, 0.5)
    assert torch.equal(plain.masks["w"], moved.masks["w"])


def test_a_layer_does_not_fall_below_its_floor() -> None:
    masks = {"a": first(50, 20), "b": first(50, 20)}
    momenta = {"a": torch.zeros(50), "b": torch.ones(50)}
    free = rewire(masks, random({"a": 50, "b": 50}, 0), momenta, 0.5)
    held = rewire(masks, random({"a": 50, "b": 50}, 0), momenta, 0.5, {"a": 17, "b": 17})
    assert counts(free.masks) == {"a": 10, "b": 30}
    assert counts(held.masks) == {"a": 17, "b": 23}


def test_a_layer_that_has_less_than_its_floor_keeps_what_it_has() -> None:
    masks = {"a": first(50, 4), "b": first(50, 20)}
    momenta = {"a": torch.zeros(50), "b": torch.ones(50)}
    found = rewire(masks, random({"a": 50, "b": 50}, 0), momenta, 0.5, {"a": 17, "b": 17})
    assert counts(found.masks) == {"a": 4, "b": 20}


def test_a_rate_that_is_a_decimal_removes_as_many_as_it_says() -> None:
    found = rewire({"w": first(200, 100)}, random({"w": 200}, 0), random({"w": 200}, 1), 0.29)
    assert found.removed == {"w": 29}


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.floats(0, 1), st.integers(0, 99))
def test_rewiring_keeps_the_number_of_active_weights(sizes: list[int], rate: float, seed: int) -> None:
    named = {f"l{i}": n for i, n in enumerate(sizes)}
    masks = {name: m > 0.3 for name, m in random(named, seed).items()}
    weights, momenta = random(named, seed + 1), random(named, seed + 2)
    found = rewire(masks, weights, momenta, rate)
    assert sum(counts(found.masks).values()) == sum(counts(masks).values())
    for name, mask in masks.items():
        assert not bool((found.stayed[name] & ~mask).any())
        assert not bool((found.stayed[name] & ~found.masks[name]).any())
        gone, kept = mask & ~found.stayed[name], found.stayed[name]
        if bool(gone.any()) and bool(kept.any()):
            assert weights[name][gone].abs().max() <= weights[name][kept].abs().min()


# Blocks of four


def test_in_the_weakest_blocks_the_weaker_weight_is_traded() -> None:
    weights = torch.tensor([5.0, 1.0, 0.0, 0.0, 0.0, 3.0, 0.2, 0.0])
    momenta = torch.tensor([0.0, 9.0, 9.0, 9.0, 0.1, 0.0, 0.5, -0.7])
    masks = {"w": torch.tensor([True, True, False, False, False, True, True, False])}
    blocks = {"w": torch.arange(8).view(2, 4)}
    found = rewire_blocks(masks, {"w": weights}, {"w": momenta}, blocks, 0.5)
    assert found.removed == found.grown == {"w": 1}
    assert found.stayed["w"].tolist() == [True, True, False, False, False, True, False, False]
    assert found.masks["w"].tolist() == [True, True, False, False, False, True, False, True]


def test_a_weight_of_a_block_may_come_back_at_once() -> None:
    masks = {"w": torch.tensor([True, True, False, False])}
    blocks = {"w": torch.arange(4).view(1, 4)}
    momenta = {"w": torch.tensor([0.0, 9.0, 1.0, 2.0])}
    found = rewire_blocks(masks, {"w": torch.tensor([1.0, 0.5, 0.0, 0.0])}, momenta, blocks, 1.0)
    assert found.stayed["w"].tolist() == [True, False, False, False]
    assert torch.equal(found.masks["w"], masks["w"])


@given(st.floats(0, 1), st.integers(0, 50))
def test_every_block_keeps_exactly_two(rate: float, seed: int) -> None:
    blocks = torch.randperm(48, generator=torch.Generator().manual_seed(seed)).view(12, 4)
    mask = torch.zeros(48, dtype=torch.bool)
    mask[blocks[:, :2].flatten()] = True
    values = random({"w": 48, "m": 48}, seed)
    found = rewire_blocks({"w": mask}, {"w": values["w"]}, {"w": values["m"]}, {"w": blocks}, rate)
    assert (found.masks["w"][blocks].sum(1) == 2).all()
    assert int((mask & ~found.stayed["w"]).sum()) == math.floor(rate * 12 + 1e-9)


# Channels


def plain_budget(limits: dict[str, float], steps: dict[str, tuple[int, ...]]) -> ChannelBudget:
    """Channels of a cost 3, of b cost 5 and of c cost 2, whatever the others keep."""
    return ChannelBudget(
        lambda kept: {"params": 3 * kept["a"] + 5 * kept["b"] + 2 * kept["c"]}, limits, steps
    )


ALL = {"a": tuple(range(10, 0, -1)), "b": tuple(range(10, 0, -1)), "c": tuple(range(10, 0, -1))}


def test_the_weakest_channels_go_and_the_freed_cost_goes_by_momentum() -> None:
    masks = {name: first(10, 4) for name in "abc"}
    norms = {name: torch.arange(10.0, 0.0, -1).double() for name in "abc"}
    momenta = {name: torch.arange(10.0).double() for name in "abc"}
    found = rewire_channels(
        masks, norms, momenta, {"a": 0.0, "b": 1.0, "c": 0.0}, 0.5, plain_budget({"params": 40}, ALL)
    )
    # Freed are 2 * (3 + 5 + 2) = 20, all of them for b: four channels.
    assert found.removed == {"a": 2, "b": 2, "c": 2}
    assert found.grown == {"a": 0, "b": 4, "c": 0}
    assert found.masks["b"].tolist() == [True, True] + 4 * [False] + 4 * [True]


def test_what_is_left_over_buys_the_most_momentum_per_cost() -> None:
    momenta = {"a": 3.0, "b": 4.0, "c": 1.5}
    gains = {name: torch.full((10,), m, dtype=torch.float64) for name, m in momenta.items()}
    shares = dict.fromkeys("abc", 1 / 3)
    # Six are left: no share of two buys a or b, c buys one; of the four left a buys most for its cost, three.
    assert fill(dict.fromkeys("abc", 1), shares, gains, plain_budget({"params": 16}, ALL)) == {
        "a": 2,
        "b": 1,
        "c": 2,
    }


def test_a_group_that_is_full_leaves_its_share_to_the_others() -> None:
    steps = {**ALL, "b": (2, 1)}
    gains = {name: torch.ones(10, dtype=torch.float64) for name in "abc"}
    found = fill(
        dict.fromkeys("abc", 1), {"a": 0.1, "b": 0.9, "c": 0.0}, gains, plain_budget({"params": 35}, steps)
    )
    assert found["b"] == 2
    assert found["a"] == 7


def test_counts_stay_on_the_levels() -> None:
    steps = {"a": (16, 8), "b": (16, 8), "c": (16, 8)}
    masks = {"a": first(16, 16), "b": first(16, 8), "c": first(16, 8)}
    values = {name: torch.rand(16, dtype=torch.float64) for name in "abc"}
    budget = plain_budget({"params": 110}, steps)
    found = rewire_channels(masks, values, values, {"a": 0.0, "b": 1.0, "c": 0.0}, 0.5, budget)
    assert counts(found.masks) == {"a": 8, "b": 8, "c": 16} or counts(found.masks) == {
        "a": 16,
        "b": 8,
        "c": 8,
    }
    late = rewire_channels(masks, values, values, {"a": 0.0, "b": 1.0, "c": 0.0}, 0.1, budget)
    assert counts(late.masks) == counts(masks)
    assert late.removed == {"a": 1, "b": 0, "c": 0}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("multiple_of", [1, 4])
def test_on_real_costs_the_limits_hold_and_nothing_more_would_fit(name: str, multiple_of: int) -> None:
    network = build(name)
    groups = find_groups(network, example()).groups
    costs = cost_model(network, groups, example())
    dense = costs.cost({})
    steps = {g.name: levels(g.channels, multiple_of, 0.1) for g in groups}
    budget = ChannelBudget(costs.cost, {m: 0.6 * dense[m] for m in ("macs", "params")}, steps)
    sizes = {g.name: g.channels for g in groups}
    kept = {g: s[-1] for g, s in steps.items()}
    assert budget.left(kept) >= 0
    kept = fill(kept, dict.fromkeys(kept, 1.0), {g: torch.ones(n) for g, n in sizes.items()}, budget)
    masks = {g: first(sizes[g], k) for g, k in kept.items()}
    generator = torch.Generator().manual_seed(3)
    for epoch in range(6):
        shares = dict(zip(sizes, torch.rand(len(sizes), generator=generator).tolist(), strict=True))
        found = rewire_channels(masks, random(sizes, epoch), random(sizes, epoch + 9), shares, 0.5, budget)
        masks, kept = found.masks, counts(found.masks)
        cost = costs.cost(kept)
        assert all(cost[m] <= limit for m, limit in budget.limits.items())
        for group, k in kept.items():
            assert k in steps[group]
            above = budget.above(group, k)
            if above is not None:
                more = costs.cost({**kept, group: above})
                assert any(more[m] > limit for m, limit in budget.limits.items())
