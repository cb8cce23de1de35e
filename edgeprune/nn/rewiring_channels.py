"""Which channels a network trades for others between epochs, within a budget of what the kept ones cost.

The structured form of dynamic network rewiring (Kundu et al. 2021). Costs here are those of the network that will be
cut: of two layers in a row a channel's price depends on how many the other one keeps, so counts are bought one level
at a time and every limit is asked each time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from edgeprune.nn.rewiring import ROUNDING, Rewired, magnitude, with_largest
from edgeprune.nn.units import drop_smallest


@dataclass(frozen=True)
class ChannelBudget:
    """What the kept channels may cost.

    costs: group -> count, to metric -> cost; must not fall with a count. limits: metric -> most allowed. levels: group
    -> the counts that it may keep, its number of channels among them.
    """

    costs: Callable[[Mapping[str, int]], Mapping[str, float]]
    limits: Mapping[str, float]
    levels: Mapping[str, tuple[int, ...]]

    def above(self, group: str, count: int) -> int | None:
        """The next larger level of a group, None when it keeps all."""
        return min((k for k in self.levels[group] if k > count), default=None)

    def left(self, kept: Mapping[str, int]) -> float:
        """What is not spent, as a share of each limit, summed over the limits; -inf when one is broken."""
        cost = self.costs(kept)
        spare = [(limit - cost[metric]) / max(limit, 1e-12) for metric, limit in self.limits.items()]
        return sum(spare) if all(s >= 0 for s in spare) else -math.inf


def rewire_channels(
    masks: Mapping[str, Tensor],
    norms: Mapping[str, Tensor],
    momenta: Mapping[str, Tensor],
    shares: Mapping[str, float],
    rate: float,
    budget: ChannelBudget,
) -> Rewired:
    """Trade whole channels: the weakest of every group go, and the freed cost goes where the momentum is largest.

    A group gives up floor(rate * active). It gets back at least what lifts it to one of its levels, and then what its
    share of the freed cost buys; the rest is spent on the most momentum per cost that still fits. Afterwards every
    count is a level, every limit holds, and no group could go up a level without breaking one.

    Args:
        masks: group -> bool (C,), a choice that fits and lies on the levels.
        norms: group -> float64 (C,), what a channel is worth. momenta: group -> float64 (C,), its momentum's norm.
        shares: group -> share of the regrowth (`normalized`).
        rate: in [0, 1].
    """
    removed = {name: math.floor(rate * int(m.sum()) + ROUNDING) for name, m in masks.items()}
    stayed = {name: drop_smallest(magnitude(norms[name]), m, removed[name]) for name, m in masks.items()}
    strength = {name: magnitude(momenta[name]) for name in masks}
    active = {name: int(m.sum()) for name, m in stayed.items()}
    kept = {name: min(k for k in budget.levels[name] if k >= count) for name, count in active.items()}
    gains = {name: _gains(strength[name], m) for name, m in stayed.items()}
    kept = fill(kept, shares, gains, budget)
    grown = {name: kept[name] - active[name] for name in masks}
    new = {name: with_largest(strength[name], m, grown[name]) for name, m in stayed.items()}
    return Rewired(new, stayed, removed, grown, dict(shares))


def fill(
    kept: Mapping[str, int], shares: Mapping[str, float], gains: Mapping[str, Tensor], budget: ChannelBudget
) -> dict[str, int]:
    """Raise counts, level by level, until no group can go up without breaking a limit.

    First each group by what its share of the unspent cost buys, where what full groups leave over is shared out again;
    then whichever gains most per cost.

    Args:
        kept: group -> a level; together within the limits.
        gains: group -> float64 (C,), what the k-th channel adds; only those beyond kept are looked at.
    """
    counts = dict(kept)
    while _share_out(counts, shares, budget):
        pass
    open_ = set(counts)
    while True:
        best: tuple[float, str, int] | None = None
        left = budget.left(counts)
        for group in [g for g in counts if g in open_]:
            level = budget.above(group, counts[group])
            after = -math.inf if level is None else budget.left({**counts, group: level})
            if level is None or after == -math.inf:
                # What does not fit now will not fit later: costs only rise.
                open_.discard(group)
                continue
            gain = float(gains[group][counts[group] : level].sum())
            value = gain / max(left - after, 1e-12)
            if best is None or value > best[0]:
                best = (value, group, level)
        if best is None:
            return counts
        counts[best[1]] = best[2]


def _share_out(counts: dict[str, int], shares: Mapping[str, float], budget: ChannelBudget) -> bool:
    """Spend each group's share of what is left on its own levels, in place; whether that filled a group."""
    steps = {group: budget.above(group, count) for group, count in counts.items()}
    open_ = [g for g, step in steps.items() if step is not None and budget.left({**counts, g: step}) >= 0]
    whole = sum(shares[g] for g in open_)
    left = budget.left(counts)
    filled = False
    for group in sorted(open_, key=lambda g: -shares[g]) if whole > 0 else ():
        allowance = left * shares[group] / whole * (1 + ROUNDING)
        before = budget.left(counts)
        while (level := budget.above(group, counts[group])) is not None:
            after = budget.left({**counts, group: level})
            if before - after > allowance:
                break
            counts[group] = level
            filled = filled or budget.above(group, level) is None
    return filled


def _gains(strength: Tensor, active: Tensor) -> Tensor:
    """What the k-th channel of a group adds: 0 for the active ones, then the strengths of the others, falling."""
    others = torch.sort(strength[~active], descending=True).values
    return torch.cat([torch.zeros(int(active.sum()), dtype=torch.float64), others])
