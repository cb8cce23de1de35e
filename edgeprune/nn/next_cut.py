"""Which units go next: SAP's count on every vector of a scope, and the cut that takes exactly so many.

The vectors are the rows of a weight ("unit"), a whole weight or group ("layer"), or all of them together ("global").
Of the 2:4 pattern a cut does not drop single weights but imposes the pattern on half as many blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edgeprune.errors import UsageError
from edgeprune.nn.pqi import ROUNDING, check_rule, sap_count, share_out
from edgeprune.nn.units import BLOCK, KEPT_OF_BLOCK, Units, drop_smallest, exactly
from edgeprune.quantities import suggest

SCOPES = ("unit", "layer", "global")
# Where nothing is said to be superfluous, a budget still takes from all alike.
TINY = 1e-9
# A change of the index counts from this share of it on: below it, it is chance.
TURN = 0.02
# No budget needs more cuts; and so many share it when the index alone would never get there.
MOST_CUTS, CUTS_WITHOUT_HELP = 100, 10
HALVINGS = 20

Scores = Mapping[str, Tensor]
UnitMasks = dict[str, Tensor]


@dataclass(frozen=True)
class Rule:
    """How many units go at once. p, q, eta, gamma, beta: of `sap_count`. scope: one of SCOPES.

    ratio: if more than 0, this share goes, whatever the index says.

    Raises:
        UsageError: a value is out of its range.
    """

    p: float = 0.5
    q: float = 1.0
    eta: float = 0.0
    gamma: float = 1.0
    beta: float = 0.9
    scope: str = "layer"
    ratio: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what is no rule."""
        check_rule(self.p, self.q, self.eta, self.gamma, self.beta)
        if self.scope not in SCOPES:
            found = f"sap: scope = {self.scope!r} is not one of {', '.join(SCOPES)}"
            raise UsageError(found, suggest(self.scope, SCOPES))
        if not 0 <= self.ratio < 1:
            raise UsageError(
                f"sap: ratio = {self.ratio:g} must be in [0, 1)",
                "0 lets the index decide, the paper's baseline is 0.2",
            )


@dataclass(frozen=True)
class Vector:
    """Some units that are counted and cut together: `start` to `stop` of a name, or all of all names (name "").

    left: how many are still there. share: of them the part that is superfluous, before gamma and beta.
    room: how many can go at most.
    """

    name: str
    start: int
    stop: int
    left: int
    share: float
    room: int


@dataclass(frozen=True)
class Cutter:
    """Cuts by a rule.

    least: name -> how many units stay at least. excess: what masks leave, as a multiple of the budget; 0 without one.
    """

    units: Units
    rule: Rule
    least: Mapping[str, int]
    excess: Callable[[Scores], float]

    def next(self, scores: Scores, masks: Scores, factor: float = 1.0) -> UnitMasks:
        """One cut by the rule's count, with gamma multiplied by a factor.

        Args:
            scores: name -> magnitudes, float64 (n,). masks: name -> bool (n,), what is left.

        Returns:
            True only where `masks` is.
        """
        found = vectors(self.units, scores, masks, self.rule, self.least)
        return self._cut(scores, masks, found, counts(found, self.rule, factor))

    def exactly(self, scores: Scores, masks: Scores, total: int) -> UnitMasks | None:
        """A cut of `total` weights, in the proportions of the rule's counts; None where the floors leave no room."""
        found = vectors(self.units, scores, masks, self.rule, self.least)
        drops = exact_counts(found, total)
        return None if drops is None else self._cut(scores, masks, found, drops)

    def factor(self, scores: Scores, masks: Scores, left: int) -> float:
        """What gamma is multiplied with, so that `left` cuts get to the budget by even steps; 1 if gamma does."""
        found = vectors(self.units, scores, masks, self.rule, self.least)
        low, high = 1.0, strongest(found, self.rule)
        goal = self.excess(masks) ** ((left - 1) / left)

        def reaches(factor: float) -> bool:
            return self.excess(self._cut(scores, masks, found, counts(found, self.rule, factor))) <= goal

        if reaches(low) or high <= low:
            return low
        for _ in range(HALVINGS):
            middle = math.sqrt(low * high)
            low, high = (low, middle) if reaches(middle) else (middle, high)
        return high

    def needed(self, scores: Scores) -> int:
        """How many cuts get to the budget, if no training changes the scores in between."""
        masks = self.units.all()
        for done in range(1, MOST_CUTS):
            after = self.next(scores, masks)
            if self.excess(after) <= 1:
                return done
            if same(after, masks):
                return max(done, CUTS_WITHOUT_HELP)
            masks = after
        return MOST_CUTS

    def _cut(self, scores: Scores, masks: Scores, found: Sequence[Vector], drops: Sequence[int]) -> UnitMasks:
        """Take the smallest of each vector, so many as said; of the pattern, half as many of the cheapest blocks."""
        after = {name: keep.clone() for name, keep in masks.items()}
        kept = self.units.best_of_blocks(scores) if self.units.granularity == "2:4" else {}
        for vector, count in zip(found, drops, strict=True):
            if kept:
                _impose((self.units, scores, kept), after, vector, count // KEPT_OF_BLOCK)
            elif not vector.name:
                return _global(scores, masks, count, self.least)
            else:
                part = slice(vector.start, vector.stop)
                after[vector.name][part] = drop_smallest(
                    scores[vector.name][part], after[vector.name][part], count
                )
        return after


def vectors(
    units: Units, scores: Scores, masks: Scores, rule: Rule, least: Mapping[str, int]
) -> list[Vector]:
    """The vectors of a scope, each with the share that its index calls superfluous.

    Args:
        scores: name -> magnitudes, float64 (n,). masks: name -> bool (n,), what is left.
        least: name -> how many units stay at least.
    """
    if rule.scope == "global":
        values = torch.cat([scores[name][masks[name]] for name in units.sizes])
        room = values.numel() - sum(least[name] for name in units.sizes)
        return [Vector("", 0, sum(units.sizes.values()), values.numel(), _share(values, rule), max(0, room))]
    found: list[Vector] = []
    for name, n in units.sizes.items():
        rows = units.shapes[name][0] if rule.scope == "unit" and name in units.shapes else 1
        width, floor = n // rows, -(-least[name] // rows)
        for start in range(0, n, width):
            values = scores[name][start : start + width][masks[name][start : start + width]]
            room = max(0, values.numel() - max(1, floor))
            found.append(Vector(name, start, start + width, values.numel(), _share(values, rule), room))
    return found


def counts(found: Sequence[Vector], rule: Rule, factor: float = 1.0) -> list[int]:
    """How many units of each vector go: floor(d * min(gamma * factor * share, beta)), as far as there is room."""
    gamma, beta = (factor, max(rule.ratio, rule.beta)) if rule.ratio else (factor * rule.gamma, rule.beta)
    return [min(v.room, math.floor(v.left * min(gamma * v.share, beta) + ROUNDING)) for v in found]


def exact_counts(found: Sequence[Vector], total: int) -> list[int] | None:
    """How many units of each vector go so that it is `total` in all, in proportion; None where there is no room."""
    if sum(v.room for v in found) < total:
        return None
    wanted = {i: max(v.share, TINY) * max(1, v.left) for i, v in enumerate(found)}
    nothing, most = dict.fromkeys(wanted, 0), {i: v.room for i, v in enumerate(found)}
    return list(share_out(wanted, total, nothing, most).values())


def strongest(found: Sequence[Vector], rule: Rule) -> float:
    """The factor with which every vector that has something superfluous loses as much as the rule ever takes."""
    shares = [v.share for v in found if v.share > 0]
    return rule.beta / (min(shares) * (1.0 if rule.ratio else rule.gamma)) if shares else 1.0


def alive(scores: Scores, masks: Scores) -> UnitMasks:
    """The scores, and -1 for what is gone: it is chosen last."""
    return {name: s.masked_fill(~masks[name], -1.0) for name, s in scores.items()}


def same(a: Scores, b: Scores) -> bool:
    """Whether two masks are equal."""
    return all(torch.equal(a[name], b[name]) for name in a)


def turned(curve: Sequence[float]) -> bool:
    """Whether an index that had risen is falling now: the network collapses. Smaller changes than TURN don't count."""
    lowest, peak = math.inf, 0.0
    for value in curve:
        lowest = min(lowest, value)
        peak = max(peak, value) if value > lowest * (1 + TURN) or peak else 0.0
    return bool(curve) and peak > 0 and curve[-1] < peak * (1 - TURN)


def _share(values: Tensor, rule: Rule) -> float:
    if rule.ratio:
        return rule.ratio
    count = sap_count(values, rule.p, rule.q, eta=rule.eta)
    return max(0.0, 1 - count.bound / max(1, values.numel()))


def _global(scores: Scores, masks: Scores, count: int, least: Mapping[str, int]) -> UnitMasks:
    left = sum(int(keep.sum()) for keep in masks.values())
    chosen = exactly(alive(scores, masks), left - count, least)
    return {name: keep & masks[name] for name, keep in chosen.items()}


def _impose(pattern: tuple[Units, Scores, Scores], masks: UnitMasks, vector: Vector, count: int) -> None:
    """Leave the two largest of `count` blocks, those that lose the least sum of squares by it, in place."""
    units, scores, kept = pattern
    whole: dict[str, Tensor] = {}
    for name in [vector.name] if vector.name else units.sizes:
        blocks = units.blocks[name]
        if vector.name:
            blocks = blocks[vector.start // BLOCK : vector.stop // BLOCK]
        whole[name] = blocks[masks[name][blocks].all(1)]
    losses = [(scores[name][blocks] ** 2 * ~kept[name][blocks]).sum(1) for name, blocks in whole.items()]
    chosen = torch.zeros(sum(map(len, losses)), dtype=torch.bool)
    chosen[torch.argsort(torch.cat(losses), stable=True)[:count]] = True
    for (name, blocks), taken in zip(whole.items(), chosen.split([len(x) for x in losses]), strict=True):
        entries = blocks[taken].flatten()
        masks[name][entries] = kept[name][entries]
