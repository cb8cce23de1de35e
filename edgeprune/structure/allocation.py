"""Allocation of a budget: how many channels each group keeps, with the least loss of importance.

Counts are restricted to levels: multiples that suit the hardware, never below the floor and never zero. Finer levels
are used where the budget can't be met otherwise.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from edgeprune.errors import InfeasibleBudget
from edgeprune.quantities import show

# Levels below this share of a layer's channels are only used where the budget can't be met without them: one layer
# with a few channels is a bottleneck. Not where the time of each count is known.
BOTTLENECK = 0.3
# Steps of a group where the time of each count is known, and the least channels of a step.
STEPS, FINEST = 16, 4
# Two limits are weighted in this many proportions, less one.
WEIGHINGS = 8

K = TypeVar("K")


class Costs(Protocol):
    """`models.CostModel`, or that with predicted seconds."""

    @property
    def channels(self) -> Mapping[str, int]:
        """Group -> channels."""
        ...

    def cost(self, kept: Mapping[str, int]) -> dict[str, float]:
        """Metrics at these counts; groups that are missing keep all of their channels."""
        ...


@dataclass(frozen=True)
class Allocation:
    """kept: group -> channels. cost: metric -> value. multiple_of: of the levels that were used."""

    kept: dict[str, int]
    cost: dict[str, float]
    multiple_of: int


@dataclass(frozen=True)
class Rules:
    """Constraints of an allocation.

    limits: metric (macs, params) -> maximum. floor: least share of a group that is kept.
    cuts: group -> relative share that is removed, in [0, 1], 1 by default; so {} is the same share for all groups. None
    allocates by importance.
    """

    limits: Mapping[str, float]
    multiple_of: int = 1
    floor: float = 0.1
    cuts: Mapping[str, float] | None = None


def levels(channels: int, multiple_of: int, floor: float) -> tuple[int, ...]:
    """Counts that a group may keep, descending from all channels, at least one.

    A group with fewer channels than two multiples uses a half, a quarter, ... of `multiple_of`.
    """
    step = max(1, multiple_of)
    while step > 1 and channels < 2 * step:
        step //= 2
    least = max(1, -int(-floor * channels // 1))
    down = [k for k in range(channels - channels % step, 0, -step) if least <= k < channels]
    return (channels, *down)


def timed_levels(channels: int, multiple_of: int, floor: float) -> tuple[int, ...]:
    """Levels where the time of each count is known: sixteen steps of a group, where multiples are coarser.

    Steps have at least `FINEST` channels: other widths leave runtimes' fast memory layouts.
    """
    finest = max(FINEST, 1 << max(0, (channels // STEPS).bit_length() - 1))
    return levels(channels, min(max(1, multiple_of), finest), floor)


def allocate(losses: Mapping[str, Tensor], costs: Costs, rules: Rules) -> Allocation:
    """Choose how many channels each group keeps.

    Args:
        losses: group -> float64 (C + 1,), the loss when k channels are kept, not increasing in k and 0 for all of them;
            comparable between groups unless `rules.cuts` is given.
    """
    multiple, steps = fitting_levels(losses, costs, rules)
    if rules.cuts is not None:
        kept = _by_shares(steps, costs, rules.limits, rules.cuts)
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
    """The coarsest levels that can meet the limits; finer ones are preferred to a bottleneck.

    Args:
        timed: the time of each count is known, so multiples and the floor against bottlenecks are not needed.

    Returns:
        The multiple; group -> levels, descending from all channels.
    """
    largest = max(1, rules.multiple_of)
    halves = [largest >> k for k in range(largest.bit_length())]
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
    """Counts with the sum k when the removed shares have given proportions.

    Args:
        sizes: name -> n. cuts: name -> relative share that is removed. k: between the sums of floors and sizes.
    """

    def kept(strength: float) -> dict[str, float]:
        return {
            m: min(n, max(floors.get(m, 0), n * (1 - strength * cuts.get(m, 1.0)))) for m, n in sizes.items()
        }

    low, high = 0.0, 1.0 / max(1e-12, min((cuts.get(m, 1.0) for m in sizes), default=1.0))
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(kept(middle).values()) >= k else (low, middle)
    return round_to_total(kept(low), k, {m: floors.get(m, 0) for m in sizes}, sizes)


def round_to_total(
    real: Mapping[K, float], total: int, least: Mapping[K, int], most: Mapping[K, int]
) -> dict[K, int]:
    """Round numbers within bounds to integers with a given sum: the largest remainders are rounded up."""
    counts = {name: max(least[name], math.floor(value)) for name, value in real.items()}
    while (missing := total - sum(counts.values())) != 0:
        step = 1 if missing > 0 else -1
        room = [n for n in real if (counts[n] < most[n] if step > 0 else counts[n] > least[n])]
        assert room, "the total lies between the sums of the bounds"
        room.sort(key=lambda name: step * (counts[name] - real[name]))
        for name in room[: abs(missing)]:
            counts[name] += step
    return counts


def keep_largest(scores: Tensor, count: int) -> Tensor:
    """bool (C,), exactly `count` True for the largest scores; of equal ones the first."""
    keep = torch.zeros(len(scores), dtype=torch.bool)
    keep[torch.argsort(scores, descending=True, stable=True)[:count]] = True
    return keep


def _fits(cost: Mapping[str, float], limits: Mapping[str, float]) -> bool:
    return all(cost[metric] <= limit for metric, limit in limits.items())


def losses_of(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """float64 (C + 1,) of each group: the loss of importance when it keeps its k best channels, infinite for 0.

    Not the sum S - R (R is the kept part of the total S), but S log(S / R): equal for the first removed channels,
    larger for the last ones. Scores don't include interactions of channels, and with sums the cheapest group would be
    cut to its floor before the next one.
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
    """The counts during an allocation, and their costs on the limited metrics."""

    kept: dict[str, int]
    losses: Mapping[str, list[float]]
    costs: Costs
    limits: Mapping[str, float]
    predict: Callable[["Choice", Mapping[str, int]], dict[str, float]] | None = None
    now: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.put(self.kept)

    def put(self, kept: Mapping[str, int]) -> None:
        """Set all counts; groups that are missing keep all of their channels."""
        self.kept = {**self.costs.channels, **kept}
        self.now = self._limited(self.kept)

    def _limited(self, kept: Mapping[str, int]) -> dict[str, float]:
        cost = self.costs.cost(kept)
        return {metric: cost[metric] for metric in self.limits}

    def after(self, changes: Mapping[str, int]) -> dict[str, float]:
        """The costs when these counts change."""
        return self.predict(self, changes) if self.predict else self._limited({**self.kept, **changes})

    def fits(self, cost: Mapping[str, float]) -> bool:
        """Whether costs are within every limit."""
        return _fits(cost, self.limits)

    def lost(self, group: str, count: int) -> float:
        """The additional loss when the count of a group changes."""
        values = self.losses.get(group)
        return values[count] - values[self.kept[group]] if values else 0.0

    def move(self, group: str, count: int) -> None:
        """Change the count of a group."""
        self.now = self.after({group: count})
        self.kept[group] = count

    def descend(
        self,
        steps: Mapping[str, tuple[int, ...]],
        *,
        jump: bool = False,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        """Greedy: the step with the least loss per relative cost saved, until everything fits.

        Args:
            jump: a step may go to any lower count, and savings beyond a limit don't count.
            weights: metric -> weight of its saving; by default 1 where a limit is exceeded.
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
                # No single step helps; all floors together do (`fitting_levels`).
                self.put({g: counts[-1] for g, counts in steps.items()})
                return
            self.move(best[2], best[1])

    def give_back(self, steps: Mapping[str, tuple[int, ...]], *, jump: bool = False) -> None:
        """Raise counts that still fit, the largest gain first; of equal ones the larger count."""
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
        """The sum of the losses of all groups."""
        return sum(self.losses[g][k] for g, k in self.kept.items() if g in self.losses)


def _cheapest(choice: Choice, steps: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The counts with the least loss, of descents that weight several limits in several proportions."""
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


def _by_shares(
    steps: dict[str, tuple[int, ...]],
    costs: Costs,
    limits: Mapping[str, float],
    cuts: Mapping[str, float],
) -> dict[str, int]:
    """The smallest strength t that fits, rounded to the nearest levels; it removes min(1, t * cut) of a group."""
    cut = {g: cuts.get(g, 1.0) for g in steps}
    deepest = max(*cut.values(), 1e-12)
    top = deepest / max(
        min(c for c in cut.values() if c > 0) if any(cut.values()) else deepest, deepest / 1000
    )
    for permille in range(int(1000 * top) + 1):
        strength = permille / 1000 / deepest
        share = {g: max(0.0, 1.0 - strength * cut[g]) for g in steps}
        kept = {
            g: min(s, key=lambda k, target=share[g] * s[0]: (abs(k - target), k)) for g, s in steps.items()
        }
        if _fits(costs.cost(kept), limits):
            return kept
    # Groups with a cut of 0 go to their floor only when nothing else is left.
    return {g: s[-1] for g, s in steps.items()}


def _infeasible(costs: Costs, kept: dict[str, int], rules: Rules) -> InfeasibleBudget:
    dense, least = costs.cost({}), costs.cost(kept)
    rows = [
        f"{m}: the limit is {show(limit, '')}, the least possible {show(least[m], '')} "
        f"({100 * least[m] / dense[m]:.1f} % of dense)"
        for m, limit in rules.limits.items()
        if least[m] > limit
    ]
    return InfeasibleBudget(
        f"the budget can't be met with {rules.floor:.0%} of every prunable layer kept: {'; '.join(rows)}",
        "raise the budget, lower --set prune.floor, or see `edgeprune why` for the layers that can't be pruned",
    )
