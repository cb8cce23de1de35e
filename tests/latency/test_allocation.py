"""Channels under a limit on time: as good as trying everything, and none goes where the device gets no faster."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import latency_files
import pytest
import torch
from latency_files import MadeUp
from torch import Tensor

from edgeprune.errors import InfeasibleBudget
from edgeprune.latency.allocation import allocate_timed, refine
from edgeprune.latency.sampling import survey
from edgeprune.latency.table import TIME, TimedCosts
from edgeprune.structure.allocation import Rules, levels, losses_of


@pytest.fixture(scope="module")
def costs(tmp_path_factory: pytest.TempPathFactory) -> TimedCosts:
    network = latency_files.subject_of("residual")
    folder: Path = tmp_path_factory.mktemp("tables")
    return TimedCosts(network.resizer.costs, survey(network, MadeUp().bench(folder), multiple_of=4))


def losses(costs: TimedCosts, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return losses_of({g: torch.rand(c, generator=generator).double() for g, c in costs.channels.items()})


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [0.8, 0.6])
def test_little_more_is_lost_than_by_the_best_of_all_choices(
    costs: TimedCosts, seed: int, share: float
) -> None:
    lost = losses(costs, seed)
    limit = share * costs.cost({})[TIME]
    found = allocate_timed(lost, costs, Rules({TIME: limit}, 1, 0.1))
    assert found.cost[TIME] <= limit
    steps = {g: levels(c, 1, 0.3) for g, c in costs.channels.items()}
    best = min(
        sum(float(lost[g][k]) for g, k in zip(steps, counts, strict=True))
        for counts in itertools.product(*steps.values())
        if costs.cost(dict(zip(steps, counts, strict=True)))[TIME] <= limit
    )
    assert sum(float(lost[g][k]) for g, k in found.kept.items()) <= 1.05 * best + 1e-9


@pytest.mark.parametrize("seed", range(4))
def test_no_channel_goes_that_could_stay_in_time(costs: TimedCosts, seed: int) -> None:
    limit = 0.7 * costs.cost({})[TIME]
    found = allocate_timed(losses(costs, seed), costs, Rules({TIME: limit}, 1, 0.1))
    for group, kept in found.kept.items():
        for more in range(kept + 1, costs.channels[group] + 1):
            assert costs.cost({**found.kept, group: more})[TIME] > limit


def test_a_limit_that_holds_already_removes_nothing(costs: TimedCosts) -> None:
    found = allocate_timed(losses(costs, 0), costs, Rules({TIME: 2 * costs.cost({})[TIME]}, 4, 0.1))
    assert found.kept == dict(costs.channels)


def test_time_and_counts_hold_together(costs: TimedCosts) -> None:
    dense = costs.cost({})
    limits = {TIME: 0.9 * dense[TIME], "macs": 0.4 * dense["macs"]}
    found = allocate_timed(losses(costs, 1), costs, Rules(limits, 1, 0.1))
    assert all(found.cost[m] <= limit for m, limit in limits.items())


def test_shares_that_a_recipe_gives_are_kept_in_time_too(costs: TimedCosts) -> None:
    limit = 0.6 * costs.cost({})[TIME]
    found = allocate_timed(losses(costs, 1), costs, Rules({TIME: limit}, 1, 0.1, {}))
    shares = [k / costs.channels[g] for g, k in found.kept.items()]
    assert found.cost[TIME] <= limit and max(shares) - min(shares) <= 0.15


def test_less_time_than_the_floors_need_is_infeasible(costs: TimedCosts) -> None:
    with pytest.raises(InfeasibleBudget, match="latency: the limit is"):
        allocate_timed(losses(costs, 0), costs, Rules({TIME: 1e-9}, 4, 0.3))


def apart(kept: Mapping[str, int]) -> float:
    """Costs that no sum over groups has: the more the groups differ in the share that goes, the dearer."""
    shares = [kept[g] / c for g, c in latency_files.subject_of("residual").channels.items()]
    return (max(shares) - min(shares)) + 0.1 * sum(1 - s for s in shares)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.8, 0.6])
def test_refined_counts_hold_the_limits_and_cost_less_together(
    costs: TimedCosts, seed: int, share: float
) -> None:
    rules = Rules({TIME: share * costs.cost({})[TIME]}, 1, 0.1)
    lost = losses(costs, seed)
    start = allocate_timed(lost, costs, rules).kept
    asked: list[dict[str, int]] = []

    def together(kept: Mapping[str, int]) -> float:
        asked.append(dict(kept))
        return apart(kept)

    found = refine(start, (lost, costs, rules), together, 40)
    assert costs.cost(found)[TIME] <= rules.limits[TIME]
    assert apart(found) == min(apart(kept) for kept in asked) <= apart(start)
    # The start, and so many tries at most.
    assert len(asked) <= 41 and asked[0] == start
    assert all(costs.cost(kept)[TIME] <= rules.limits[TIME] for kept in asked)


def test_refining_finds_what_the_sum_can_not_see(costs: TimedCosts) -> None:
    rules = Rules({TIME: 0.7 * costs.cost({})[TIME]}, 1, 0.1)
    lost = losses(costs, 0)
    start = allocate_timed(lost, costs, rules).kept
    thinned = min(start, key=lambda g: start[g] / costs.channels[g])
    found = refine(start, (lost, costs, rules), lambda kept: -kept[thinned], 200)
    assert found[thinned] > start[thinned] and any(found[g] < start[g] for g in start)


def test_without_tries_the_start_stays(costs: TimedCosts) -> None:
    lost, rules = losses(costs, 0), Rules({TIME: 0.7 * costs.cost({})[TIME]}, 1, 0.1)
    start = allocate_timed(lost, costs, rules).kept
    assert refine(start, (lost, costs, rules), apart, 0) == start
