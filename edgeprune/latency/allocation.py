"""Allocation under a limit on predicted time: a knapsack over measured staircases.

Time is a step function of the counts, so from any count every other one is a candidate. Starts come from a greedy
descent (the least importance lost per second saved) and from a price of time (a Lagrange multiplier; each group in turn
takes its best count, since a layer's time depends on two groups). Then counts are raised while they fit, and pairs are
exchanged while less importance is lost. Channels that cost no time stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from edgeprune.latency.table import TIME, TimedCosts
from edgeprune.progress import bar
from edgeprune.structure import Allocation, Choice, Rules, allocate, fitting_levels, levels

EXCHANGES = 60
# Up to this many groups every step of a group is tried against every one of another, else only the next one.
FEW = 16
# Bisections of the price of time, sweeps over the groups at one price, and starts that are improved.
PRICES, SWEEPS, STARTS = 14, 6, 2


def allocate_timed(losses: Mapping[str, Tensor], costs: TimedCosts, rules: Rules) -> Allocation:
    """`structure.allocate` with a limit in seconds on "latency" in `rules.limits`."""
    if rules.cuts is not None:
        return allocate(losses, costs, rules)
    multiple, steps = fitting_levels(losses, costs, rules, timed=True)
    state = Choice({}, {g: v.tolist() for g, v in losses.items()}, costs, rules.limits, _predicted)
    finer = {}
    for group, counts in steps.items():
        halves = levels(costs.channels[group], max(1, multiple // 2), rules.floor)
        finer[group] = tuple(sorted({*counts, *(k for k in halves if k >= counts[-1])}, reverse=True))
    best: tuple[float, dict[str, int]] | None = None
    for start in _starts(state, steps):
        state.put(start)
        state.give_back(steps, jump=True)
        _exchange(state, steps)
        state.give_back(finer, jump=True)
        if best is None or state.total_lost < best[0]:
            best = (state.total_lost, dict(state.kept))
    assert best is not None, "the descent always ends"
    return Allocation(best[1], costs.cost(best[1]), multiple)


def _starts(state: Choice, steps: Mapping[str, tuple[int, ...]]) -> list[dict[str, int]]:
    """Choices that fit: of a greedy descent, and of prices of time that are just high enough."""
    dense = {g: counts[0] for g, counts in steps.items()}
    state.put(dense)
    state.descend(steps, jump=True)
    found = [dict(state.kept)]
    if found[0] == dense:
        return found
    for first in (dense, {g: counts[-1] for g, counts in steps.items()}):
        low, high = 0.0, 1.0
        for _ in range(PRICES):
            price = (low + high) / 2
            state.put(first)
            # From 0 to infinity.
            _relax(state, steps, price / (1 - price))
            if not state.fits(state.now):
                low = price
                continue
            high = price
            found.append(dict(state.kept))
    unique = {tuple(sorted(kept.items())): kept for kept in found}
    return [found[0], *[kept for kept in list(unique.values())[::-1] if kept != found[0]][:STARTS]]


def _relax(state: Choice, steps: Mapping[str, tuple[int, ...]], price: float) -> None:
    for _ in range(SWEEPS):
        changed = False
        for group, counts in steps.items():
            best: tuple[float, int] | None = None
            for count in counts:
                after = state.after({group: count})
                value = state.lost(group, count) + price * sum(after[m] / x for m, x in state.limits.items())
                if best is None or value < best[0] - 1e-12:
                    best = (value, count)
            if best is not None and best[1] != state.kept[group]:
                state.move(group, best[1])
                changed = True
        if not changed:
            return


def _predicted(state: Choice, changes: Mapping[str, int]) -> dict[str, float]:
    """The costs after some changes of counts; predicts anew only the segments that they touch."""
    assert isinstance(state.costs, TimedCosts)
    model = state.costs.model
    new = {**state.kept, **changes}
    out = {}
    if any(metric != TIME for metric in state.limits):
        counted = state.costs.counted.cost(new)
        out = {metric: counted[metric] for metric in state.limits if metric != TIME}
    if TIME in state.limits:
        touched = dict.fromkeys(p for g in changes for p in model.touched[g])
        out[TIME] = state.now[TIME] + sum(model.of(p, new) - model.of(p, state.kept) for p in touched)
    return out


def _exchange(state: Choice, steps: Mapping[str, tuple[int, ...]]) -> None:
    for _ in range(EXCHANGES):
        best: tuple[float, str, int, str, int] | None = None
        for up, counts in steps.items():
            higher = [c for c in counts if c > state.kept[up]]
            for more in higher if len(steps) <= FEW else higher[-1:]:
                gain = -state.lost(up, more)
                found = _cheapest(state, steps, (up, more), gain)
                if found is not None and (best is None or found[0] < best[0]):
                    best = (found[0], up, more, *found[1:])
        if best is None:
            return
        _, up, more, down, fewer = best
        state.move(up, more)
        state.move(down, fewer)
        state.give_back(steps, jump=True)


def _cheapest(
    state: Choice, steps: Mapping[str, tuple[int, ...]], raised: tuple[str, int], gain: float
) -> tuple[float, str, int] | None:
    """The cheapest reduction of another group with which the raised one fits: total loss (< 0), group, count."""
    best: tuple[float, str, int] | None = None
    up, more = raised
    for down, counts in steps.items():
        if down == up:
            continue
        for fewer in (c for c in counts if c < state.kept[down]):
            net = state.lost(down, fewer) - gain
            if net >= -1e-12 * max(1.0, gain) or (best is not None and net >= best[0]):
                break
            if state.fits(state.after({up: more, down: fewer})):
                best = (net, down, fewer)
                break
    return best


# Steps that a group is raised at once, and exchanges without improvement before the search stops.
UP = 2
PATIENCE = 12


def refine(
    start: Mapping[str, int],
    problem: tuple[Mapping[str, Tensor], TimedCosts, Rules],
    joint_loss: Callable[[Mapping[str, int]], float],
    tries: int,
) -> dict[str, int]:
    """Improve counts by exchanges whose joint loss is measured.

    Args:
        start: group -> count, within the limits. problem: as for `allocate_timed`; `rules.cuts` is None.
        joint_loss: of counts, measured. tries: the most measurements.
    """
    losses, costs, rules = problem
    _, steps = fitting_levels(losses, costs, rules, timed=True)
    state = Choice(dict(start), {g: v.tolist() for g, v in losses.items()}, costs, rules.limits, _predicted)
    best, failures, left = joint_loss(state.kept), 0, tries
    with bar(tries, "joint loss of layers") as advance:
        moves = _moves(state, steps)
        while moves and left > 0 and failures < PATIENCE:
            changes = moves.pop(0)
            value = joint_loss({**state.kept, **changes})
            left, failures = left - 1, failures + 1
            advance()
            if value < best:
                for group, count in changes.items():
                    state.move(group, count)
                best, failures = value, 0
                moves = _moves(state, steps)
        advance(left)
    return dict(state.kept)


def _moves(state: Choice, steps: Mapping[str, tuple[int, ...]]) -> list[dict[str, int]]:
    found = []
    for up, counts in steps.items():
        for more in [c for c in counts if c > state.kept[up]][-UP:]:
            if state.fits(state.after({up: more})):
                found.append((state.lost(up, more), {up: more}))
                continue
            for down, others in steps.items():
                lower = (c for c in others if c < state.kept[down])
                fewer = next((c for c in lower if state.fits(state.after({up: more, down: c}))), None)
                if down != up and fewer is not None:
                    lost = state.lost(up, more) + state.lost(down, fewer)
                    found.append((lost, {up: more, down: fewer}))
    return [changes for _, changes in sorted(found, key=lambda move: move[0])]
