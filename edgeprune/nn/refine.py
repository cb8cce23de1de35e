"""Counts that are measured together: what layers cost alone says little of what they cost with each other.

From a choice that a knapsack made, one group goes a step or two up and another one as far down as that takes; the
exchanges that look best by what each group costs alone are measured first, and one that costs less together stays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from edgeprune.nn.allocate import Rules, fitting_levels
from edgeprune.nn.knapsack import State
from edgeprune.nn.latency_table import TimedCosts
from edgeprune.nn.progress import bar

# Steps that a group goes up at once, and exchanges that are measured in vain before it is enough.
UP = 2
IN_VAIN = 12


def refine(
    start: Mapping[str, int],
    problem: tuple[Mapping[str, Tensor], TimedCosts, Rules],
    together: Callable[[Mapping[str, int]], float],
    tries: int,
) -> dict[str, int]:
    """Counts within the same limits that cost less together than those of the start, or the start.

    Args:
        start: group -> count, within the limits. problem: as for `allocate_timed`; `rules.cuts` is None.
        together: counts -> what they cost together, measured. tries: how often it is measured at most.
    """
    losses, costs, rules = problem
    _, steps = fitting_levels(losses, costs, rules, timed=True)
    state = State(dict(start), {g: v.tolist() for g, v in losses.items()}, costs, rules.limits)
    best, vain, left = together(state.kept), 0, tries
    with bar(tries, "what layers can miss together") as advance:
        moves = _moves(state, steps)
        while moves and left > 0 and vain < IN_VAIN:
            changes = moves.pop(0)
            value = together({**state.kept, **changes})
            left, vain = left - 1, vain + 1
            advance()
            if value < best:
                for group, count in changes.items():
                    state.move(group, count)
                best, vain = value, 0
                moves = _moves(state, steps)
        advance(left)
    return dict(state.kept)


def _moves(state: State, steps: Mapping[str, tuple[int, ...]]) -> list[dict[str, int]]:
    """Exchanges that fit, those first that look best by what each group costs alone."""
    found = []
    for up, counts in steps.items():
        for more in [c for c in counts if c > state.kept[up]][-UP:]:
            if state.fits(state.after({up: more})):
                found.append((state.lost(up, more), {up: more}))
                continue
            for down, others in steps.items():
                fewer = next(
                    (
                        c
                        for c in others
                        if c < state.kept[down] and state.fits(state.after({up: more, down: c}))
                    ),
                    None,
                )
                if down != up and fewer is not None:
                    lost = state.lost(up, more) + state.lost(down, fewer)
                    found.append((lost, {up: more, down: fewer}))
    return [changes for _, changes in sorted(found, key=lambda move: move[0])]
