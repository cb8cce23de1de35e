"""How many channels each group keeps, so that a budget holds: the cheapest loss of importance per cost saved.

Kept counts move on levels: multiples of what the hardware is fast with, never below the floor and never zero.
Where no choice on those levels meets the budget, finer levels are tried, and the result says so.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from edgeprune.errors import InfeasibleBudget
from edgeprune.quantities import show

# Levels below this share of a layer's channels are only used when the budget can't be met without them: one layer cut
# to a few channels chokes all that passes through it. Not where the time of each count is known.
BOTTLENECK = 0.3
# Steps that a group has where the time of each is known, and channels of a step at least.
STEPS, FINEST = 16, 4
# So many proportions of two limits are tried, less one.
WEIGHINGS = 8


class Costs(Protocol):
    """What counts cost: `models.costs.CostModel`, or that with predicted seconds."""

    @property
    def channels(self) -> Mapping[str, int]:
        """Group -> channels."""
        ...

    def cost(self, kept: Mapping[str, int]) -> dict[str, float]:
        """Metric -> what it is when each group keeps so many channels."""
        ...


@dataclass(frozen=True)
class Allocation:
    """kept: group -> channels that stay. cost: metric -> what that costs. multiple_of: what the levels ended as."""

    kept: dict[str, int]
    cost: dict[str, float]
    multiple_of: int


@dataclass(frozen=True)
class Rules:
    """What must hold.

    limits: metric (macs, params) -> most allowed. floor: least share of a group that stays.
    cuts: group -> how much of it goes relative to the others, in [0, 1], 1 where nothing is said; so {} is the same
    share for all groups. None shares by importance.
    """

    limits: Mapping[str, float]
    multiple_of: int = 1
    floor: float = 0.1
    cuts: Mapping[str, float] | None = None


def levels(channels: int, multiple_of: int, floor: float) -> tuple[int, ...]:
    """Counts that a group of so many channels may keep, descending from all of them; at least one is kept.

    A group too small to hold two multiples uses a half, a quarter, ... of `multiple_of`.
    """
    step = max(1, multiple_of)
    while step > 1 and channels < 2 * step:
        step //= 2
    least = max(1, -int(-floor * channels // 1))
    down = [k for k in range(channels - channels % step, 0, -step) if least <= k < channels]
    return (channels, *down)


def timed_levels(channels: int, multiple_of: int, floor: float) -> tuple[int, ...]:
    """Counts for where it is known what each takes: sixteen steps of a group, where multiples are coarser.

    But none below `FINEST` channels: widths that are no multiples of a small vector leave runtimes' fast layouts.
    """
    finest = max(FINEST, 1 << max(0, (channels // STEPS).bit_length() - 1))
    return levels(channels, min(max(1, multiple_of), finest), floor)


def allocate(losses: Mapping[str, Tensor], costs: Costs, rules: Rules) -> Allocation:
    """Choose how many channels each group keeps.

    Args:
        losses: group -> float64 (C + 1,), what it costs to keep k channels, not increasing in k and 0 for all of them;
            comparable between groups unless `rules.cuts` decides.
    """
    multiple, steps = fitting_levels(losses, costs, rules)
    if rules.cuts is not None:
        kept = by_shares(steps, costs, rules.limits, rules.cuts)
        return Allocation(kept, costs.cost(kept), multiple)
    choice = Choice({}, {g: values.tolist() for g, values in losses.items()}, costs, rules.limits)
    choice.put(_cheapest(choice, steps))
    if multiple > 1:
        halves = {g: levels(costs.channels[g], multiple // 2, rules.floor) for g in steps}
        choice.give_back({g: counts for g, counts in halves.items() if choice.kept[g] in counts})
    kept = {g: choice.kept[g] for g in steps}
    return Allocation(kept, costs.cost(kept), multiple)


def fitting_levels(
    groups: Mapping[str, object], costs: Costs, rules: Rules, *, timed: bool = False
) -> tuple[int, dict[str, tuple[int, ...]]]:
    """The coarsest levels that can meet the limits: rather finer ones than a bottleneck, rather that than none.

    Args:
        timed: the time of each count is known. What stands in for that elsewhere, multiples and a comfortable floor,
            is not needed then.
    """
    wish = max(1, rules.multiple_of)
    halves = [wish >> k for k in range(wish.bit_length())]
    comfortable = [] if timed else [(m, max(BOTTLENECK, rules.floor)) for m in halves[:2]]
    choices = timed_levels if timed else levels
    steps: dict[str, tuple[int, ...]] = {}
    for multiple, floor in [*comfortable, *((m, rules.floor) for m in halves)]:
        steps = {g: choices(costs.channels[g], multiple, floor) for g in groups}
        if _fits(costs.cost({g: s[-1] for g, s in steps.items()}), rules.limits):
            return multiple, steps
    raise _infeasible(costs, {g: s[-1] for g, s in steps.items()}, rules)


def shared_counts(
    sizes: Mapping[str, int], cuts: Mapping[str, float], k: int, floors: Mapping[str, int]
) -> dict[str, int]:
    """How many of each stay, k in all, when what goes is shared out in given proportions.

    Args:
        sizes: name -> n. cuts: name -> how much of it goes relative to the others. floors: name -> least that stays.

    Returns:
        name -> count; their sum is exactly k, which lies between the sums of the floors and of the sizes.
    """

    def kept(strength: float) -> dict[str, float]:
        return {
            m: min(n, max(floors.get(m, 0), n * (1 - strength * cuts.get(m, 1.0)))) for m, n in sizes.items()
        }

    low, high = 0.0, 1.0 / max(1e-12, min((cuts.get(m, 1.0) for m in sizes), default=1.0))
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(kept(middle).values()) >= k else (low, middle)
    wish = kept(low)
    out = {name: int(value) for name, value in wish.items()}
    while (short := k - sum(out.values())) != 0:
        step = 1 if short > 0 else -1
        room = [m for m in out if (out[m] < sizes[m] if step > 0 else out[m] > floors.get(m, 0))]
        assert room, "k lies between the floors and the sizes"
        room.sort(key=lambda m: step * (out[m] - wish[m]))
        for name in room[: abs(short)]:
            out[name] += step
    return out


def keep_largest(scores: Tensor, count: int) -> Tensor:
    """Exactly `count` True for the largest scores; of equal ones the first."""
    keep = torch.zeros(len(scores), dtype=torch.bool)
    keep[torch.argsort(scores, descending=True, stable=True)[:count]] = True
    return keep


def _fits(cost: Mapping[str, float], limits: Mapping[str, float]) -> bool:
    return all(cost[metric] <= limit for metric, limit in limits.items())


def losses_of(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What it costs in importance when a group keeps its k best channels, from a score for each channel.

    Not their sum S - R alone (R is what stays of the total S), but S log(S / R): the same for the first channels
    that go, ever dearer for the last ones. Additive scores say nothing of how channels lean on each other, and with
    sums the cheapest group is emptied to its floor before the next one is touched.
    """
    out = {}
    for group, values in scores.items():
        kept = torch.sort(values.double(), descending=True).values.cumsum(0)
        total = float(kept[-1])
        if total <= 0:
            out[group] = torch.zeros(len(values) + 1, dtype=torch.float64)
            continue
        lost = -total * torch.clamp(kept / total, min=1e-12).log()
        out[group] = torch.cat([torch.tensor([float("inf")], dtype=torch.float64), lost])
    return out


@dataclass
class Choice:
    """Counts that are being chosen, what they cost, and what is lost by them."""

    kept: dict[str, int]
    losses: Mapping[str, list[float]]
    costs: Costs
    limits: Mapping[str, float]
    now: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.put(self.kept)

    def put(self, kept: Mapping[str, int]) -> None:
        """Start anew from these counts; groups that are missing keep all of their channels."""
        self.kept = {**self.costs.channels, **kept}
        self.now = self._limited(self.kept)

    def _limited(self, kept: Mapping[str, int]) -> dict[str, float]:
        cost = self.costs.cost(kept)
        return {metric: cost[metric] for metric in self.limits}

    def after(self, changes: Mapping[str, int]) -> dict[str, float]:
        """The costs when these groups keep so many."""
        return self._limited({**self.kept, **changes})

    def fits(self, cost: Mapping[str, float]) -> bool:
        """Whether every limit holds."""
        return _fits(cost, self.limits)

    def lost(self, group: str, count: int) -> float:
        """The importance that is lost more than now when a group keeps so many."""
        values = self.losses.get(group)
        return values[count] - values[self.kept[group]] if values else 0.0

    def move(self, group: str, count: int) -> None:
        """Let a group keep so many."""
        self.now = self.after({group: count})
        self.kept[group] = count

    def descend(
        self,
        steps: Mapping[str, tuple[int, ...]],
        *,
        jump: bool = False,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        """Greedy: always the step with the least importance lost per (relative) cost saved, until everything fits.

        Args:
            jump: a step may go to any lower count, and what it saves beyond a limit is worth nothing.
            weights: metric -> what its saving counts; without, those whose limit is exceeded count alike.
        """
        while not self.fits(self.now):
            over = {m: 1.0 for m, limit in self.limits.items() if self.now[m] > limit}
            best: tuple[float, int, str] | None = None
            for group, counts in steps.items():
                lower = [c for c in counts if c < self.kept[group]]
                for count in lower if jump else lower[:1]:
                    after = self.after({group: count})
                    saved = sum(
                        weight
                        * (self.now[m] - max(after[m], self.limits[m] if jump else 0.0))
                        / self.limits[m]
                        for m, weight in (weights or over).items()
                    )
                    if saved <= 0:
                        continue
                    price = max(0.0, self.lost(group, count)) / saved
                    if best is None or (price, -count) < (best[0], -best[1]):
                        best = (price, count, group)
            if best is None:
                # No single step helps; all floors together do, as was checked.
                self.put({g: counts[-1] for g, counts in steps.items()})
                return
            self.move(best[2], best[1])

    def give_back(self, steps: Mapping[str, tuple[int, ...]], *, jump: bool = False) -> None:
        """Raise what still fits, dearest importance first; of equal ones the larger count."""
        while True:
            best: tuple[float, int, str] | None = None
            for group, counts in steps.items():
                higher = [c for c in counts if c > self.kept[group]]
                for count in higher if jump else higher[-1:]:
                    gain = -self.lost(group, count)
                    if (best is None or (gain, count) > best[:2]) and self.fits(self.after({group: count})):
                        best = (gain, count, group)
            if best is None:
                return
            self.move(best[2], best[1])

    @property
    def total_lost(self) -> float:
        """The importance that is lost in all."""
        return sum(self.losses[g][k] for g, k in self.kept.items() if g in self.losses)


def _cheapest(choice: Choice, steps: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    dense = {g: counts[0] for g, counts in steps.items()}
    choice.put(dense)
    over = [m for m, limit in choice.limits.items() if choice.now[m] > limit]
    weights: list[Mapping[str, float] | None] = [None]
    for k in range(1, WEIGHINGS if len(over) > 1 else 0):
        share = k / WEIGHINGS
        weights += [
            {m: share if m == first else (1 - share) / (len(over) - 1) for m in over} for first in over[:-1]
        ]
    found: list[tuple[float, dict[str, int]]] = []
    for weigh in weights:
        choice.put(dense)
        choice.descend(steps, weights=weigh)
        choice.give_back(steps)
        found.append((choice.total_lost, dict(choice.kept)))
    return min(found, key=lambda pair: pair[0])[1]


def by_shares(
    steps: dict[str, tuple[int, ...]],
    costs: Costs,
    limits: Mapping[str, float],
    cuts: Mapping[str, float],
) -> dict[str, int]:
    """The gentlest cut in the given proportions, rounded to the nearest levels, that fits.

    Strength t takes the share min(1, t * cut) of a group.
    """
    cut = {g: cuts.get(g, 1.0) for g in steps}
    deepest = max(*cut.values(), 1e-12)
    top = deepest / max(
        min(c for c in cut.values() if c > 0) if any(cut.values()) else deepest, deepest / 1000
    )
    for permille in range(int(1000 * top) + 1):
        strength = permille / 1000 / deepest
        share = {g: max(0.0, 1.0 - strength * cut[g]) for g in steps}
        kept = {g: min(s, key=lambda k, wish=share[g] * s[0]: (abs(k - wish), k)) for g, s in steps.items()}
        if _fits(costs.cost(kept), limits):
            return kept
    # What is not to be cut at all goes to its floor only when nothing else is left.
    return {g: s[-1] for g, s in steps.items()}


def _infeasible(costs: Costs, kept: dict[str, int], rules: Rules) -> InfeasibleBudget:
    dense, least = costs.cost({}), costs.cost(kept)
    rows = [
        f"{m}: asked for at most {show(limit, '')}, got down to {show(least[m], '')} "
        f"({100 * least[m] / dense[m]:.1f} % of dense)"
        for m, limit in rules.limits.items()
        if least[m] > limit
    ]
    return InfeasibleBudget(
        f"the budget can't be met with {rules.floor:.0%} of every prunable layer kept: {'; '.join(rows)}",
        "raise the budget, lower --set prune.floor, or see `edgeprune why` for the layers that can't be pruned",
    )
