"""Several limits at once: all hold, none is met by far more than it asks, and little more is lost than by the best."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from edgeprune.structure.allocation import Rules, allocate, levels, losses_of

# Group -> multiply-accumulates and parameters of a channel: early layers are dear in one, late ones in the other.
PRICES = {"early": (8.0, 1.0), "middle": (4.0, 4.0), "late": (1.0, 8.0)}
CHANNELS = 12


@dataclass(frozen=True)
class Made:
    """Costs that are linear in the channels."""

    channels: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(PRICES, CHANNELS))

    def cost(self, kept: Mapping[str, int]) -> dict[str, float]:
        counts = {g: kept.get(g, CHANNELS) for g in PRICES}
        return {
            metric: sum(PRICES[g][k] * n for g, n in counts.items())
            for k, metric in enumerate(("macs", "params"))
        }


def lost(losses: Mapping[str, Tensor], kept: Mapping[str, int]) -> float:
    return sum(float(losses[g][n]) for g, n in kept.items())


def scores(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return losses_of({g: torch.rand(CHANNELS, generator=generator).double() for g in PRICES})


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.5, 0.35), (0.4, 0.6), (0.7, 0.4)])
def test_two_limits_cost_little_more_than_the_best_of_all_choices(
    seed: int, shares: tuple[float, float]
) -> None:
    costs, losses = Made(), scores(seed)
    dense = costs.cost({})
    limits = {m: share * dense[m] for m, share in zip(("macs", "params"), shares, strict=True)}
    found = allocate(losses, costs, Rules(limits, 1, 0.0))
    assert all(found.cost[m] <= limit for m, limit in limits.items())
    choices = (
        dict(zip(PRICES, counts, strict=True))
        for counts in itertools.product(levels(CHANNELS, 1, 0.3), repeat=len(PRICES))
    )
    best = min(
        lost(losses, kept)
        for kept in choices
        if all(costs.cost(kept)[m] <= limit for m, limit in limits.items())
    )
    assert lost(losses, found.kept) <= 1.05 * best


def test_one_limit_is_not_overshot_on_the_way_to_the_other() -> None:
    losses = losses_of({g: torch.ones(CHANNELS).double() for g in PRICES})
    dense = Made().cost({})
    found = allocate(
        losses, Made(), Rules({"macs": 0.5 * dense["macs"], "params": 0.4 * dense["params"]}, 1, 0.0)
    )
    assert found.cost["macs"] >= 0.45 * dense["macs"]
    assert found.cost["params"] >= 0.35 * dense["params"]
