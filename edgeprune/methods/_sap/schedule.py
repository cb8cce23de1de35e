"""Which units go next: SAP's count on every vector of a scope, and the cut that takes exactly that many.

The vectors are the rows of a weight ("unit"), a whole weight or group ("layer"), or all of them together ("global").
For 2:4 a cut imposes the pattern on half as many blocks.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edgeprune.errors import UsageError
from edgeprune.quantities import check_choice
from edgeprune.structure import (
    BLOCK,
    KEPT_OF_BLOCK,
    ROUNDING,
    Units,
    check_rule,
    drop_smallest,
    exactly,
    share_out,
    superfluous,
)

SCOPES = ("unit", "layer", "global")
TINY = 1e-9
# Smaller relative changes of the index are noise.
TURN = 0.02
# Most cuts of a budget; and how many when counts alone would never reach it.
MOST_CUTS, CUTS_WITHOUT_HELP = 100, 10
# Most counts of one cut, and the units that a count must take, or it is the last.
MOST_COUNTS, LEAST_COUNT = 1000, 0.01
HALVINGS = 20

Scores = Mapping[str, Tensor]
UnitMasks = dict[str, Tensor]


@dataclass(frozen=True)
class Rule:
    """How many units go at once. p, q, eta, gamma, beta: of `sap_count`. scope: one of SCOPES.

    ratio: if more than 0, a fixed share instead of the index.
    """

    p: float = 0.5
    q: float = 1.0
    eta: float = 0.0
    gamma: float = 1.0
    beta: float = 0.9
    scope: str = "layer"
    ratio: float = 0.0

    def __post_init__(self) -> None:
        check_rule(self.p, self.q, self.eta, self.gamma, self.beta)
        check_choice("sap: scope", self.scope, SCOPES)
        if not 0 <= self.ratio < 1:
            raise UsageError(
                f"sap: ratio = {self.ratio:g} must be in [0, 1)",
                "0 lets the index decide, the paper's baseline is 0.2",
            )


@dataclass(frozen=True, eq=False)
class PrunedVector:
    """Units that are counted and cut together: `start` to `stop` of a name, or all of all names (name "").

    left: how many remain. room: how many can go at most. shares: float64 (left + 1,), the superfluous part of the n
    largest, before gamma and beta.
    """

    name: str
    start: int
    stop: int
    left: int
    room: int
    shares: Tensor

    def count(self, gone: float, rule: Rule) -> float:
        """How many go next when `gone` are gone: n * min(gamma * share, beta), at most the room."""
        n = self.left - gone
        share = rule.ratio or min(rule.gamma * float(self.shares[int(n)]), rule.beta)
        return min(self.room - gone, n * share)


@dataclass(frozen=True)
class CutSchedule:
    """Cuts by a rule.

    least: name -> least number of units. excess: masks -> their cost as a multiple of the budget; 0 without one.
    """

    units: Units
    rule: Rule
    least: Mapping[str, int]
    excess: Callable[[Scores], float]

    def next(self, scores: Scores, masks: Scores, goal: float = math.inf) -> tuple[UnitMasks, float]:
        """One cut by successive counts of the rule, until the excess is at most `goal`.

        Args:
            scores: name -> magnitudes, float64 (n,). masks: name -> bool (n,), what is left.

        Returns:
            The new masks, and the number of counts; the last one may be fractional.
        """
        found = vectors(self.units, scores, masks, self.rule, self.least)
        excess, left = self.excess(masks), sum(int(keep.sum()) for keep in masks.values())

        def reached(drops: Sequence[int]) -> bool:
            if self.units.granularity == "channel":
                return self.excess(self._cut(scores, masks, found, drops)) <= goal
            return excess * (left - sum(drops)) / left <= goal

        drops, rounds = descend(found, self.rule, reached)
        return self._cut(scores, masks, found, drops), rounds

    def exactly(self, scores: Scores, masks: Scores, total: int) -> UnitMasks | None:
        """A cut of `total` weights in proportion to successive counts; None where floors leave no room."""
        found = vectors(self.units, scores, masks, self.rule, self.least)
        if sum(v.room for v in found) < total:
            return None
        return self._cut(scores, masks, found, exact_counts(found, self.rule, total))

    def needed(self, scores: Scores) -> int:
        """How many counts reach the budget, if no training changes the scores in between."""
        after, rounds = self.next(scores, self.units.all(), 1.0)
        short = self.excess(after) > 1
        return min(MOST_CUTS, max(math.ceil(rounds), CUTS_WITHOUT_HELP if short else 1))

    def _cut(
        self, scores: Scores, masks: Scores, found: Sequence[PrunedVector], drops: Sequence[int]
    ) -> UnitMasks:
        """Remove the smallest of each vector; for 2:4, impose the pattern on half as many blocks."""
        after = {name: keep.clone() for name, keep in masks.items()}
        kept = self.units.best_of_blocks(scores) if self.units.granularity == "2:4" else {}
        for vector, count in zip(found, drops, strict=True):
            if kept:
                _impose((self.units, scores, kept), after, vector, count // KEPT_OF_BLOCK)
            elif not vector.name:
                left = sum(int(keep.sum()) for keep in masks.values()) - count
                chosen = exactly(alive(scores, masks), left, self.least)
                return {name: keep & masks[name] for name, keep in chosen.items()}
            else:
                part = slice(vector.start, vector.stop)
                after[vector.name][part] = drop_smallest(
                    scores[vector.name][part], after[vector.name][part], count
                )
        return after


def vectors(
    units: Units, scores: Scores, masks: Scores, rule: Rule, least: Mapping[str, int]
) -> list[PrunedVector]:
    """The vectors of a scope."""

    def vector(place: tuple[str, int, int], values: Tensor, floor: int) -> PrunedVector:
        room = max(0, values.numel() - max(1, floor))
        return PrunedVector(*place, values.numel(), room, superfluous(values, rule.p, rule.q, rule.eta))

    if rule.scope == "global":
        everything = torch.cat([scores[name][masks[name]] for name in units.sizes])
        return [
            vector(("", 0, sum(units.sizes.values())), everything, sum(least[name] for name in units.sizes))
        ]
    found: list[PrunedVector] = []
    for name, n in units.sizes.items():
        rows = units.shapes[name][0] if rule.scope == "unit" and name in units.shapes else 1
        for start in range(0, n, n // rows):
            part = slice(start, start + n // rows)
            values = scores[name][part][masks[name][part]]
            found.append(vector((name, part.start, part.stop), values, -(-least[name] // rows)))
    return found


def descend(
    found: Sequence[PrunedVector], rule: Rule, reached: Callable[[Sequence[int]], bool]
) -> tuple[list[int], float]:
    """How many units of each vector go: a whole count, and more counts until `reached`, as if each were cut.

    Unlike one count times a factor, this takes little from a layer of which little is superfluous.

    Returns:
        The numbers, and how many counts they are; the last one only the part that is needed.
    """
    first = [math.floor(v.count(0, rule) + ROUNDING) for v in found]
    if reached(first):
        return first, 1.0
    gone: list[float] = [*first]
    for rounds in range(1, MOST_COUNTS):
        more = _more(found, gone, rule)
        if sum(more) < LEAST_COUNT:
            return _partly(gone, more, 0.0), float(rounds)
        if reached(_partly(gone, more, 1.0)):
            low, high = 0.0, 1.0
            for _ in range(HALVINGS):
                middle = (low + high) / 2
                low, high = (low, middle) if reached(_partly(gone, more, middle)) else (middle, high)
            return _partly(gone, more, high), rounds + high
        gone = [a + b for a, b in zip(gone, more, strict=True)]
    return _partly(gone, gone, 0.0), float(MOST_COUNTS)


def exact_counts(found: Sequence[PrunedVector], rule: Rule, total: int) -> list[int]:
    """How many units of each vector go so that it is `total` in all, by successive counts."""
    gone = [0.0] * len(found)
    while (rest := total - sum(gone)) > 0:
        more = _more(found, gone, rule)
        if sum(more) < LEAST_COUNT:
            # Where nothing is superfluous, a budget still takes from all alike.
            more = [v.room - g for v, g in zip(found, gone, strict=True)]
        part = min(1.0, rest / sum(more))
        gone = [a + part * b for a, b in zip(gone, more, strict=True)]
        if part < 1 or rest <= sum(more):
            break
    shares = {i: max(g, TINY) for i, g in enumerate(gone)}
    nothing, most = dict.fromkeys(shares, 0), {i: v.room for i, v in enumerate(found)}
    return list(share_out(shares, total, nothing, most).values())


def _more(found: Sequence[PrunedVector], gone: Sequence[float], rule: Rule) -> list[float]:
    """The next count; in fractions of units only where it is less than one unit everywhere."""
    exact = [v.count(g, rule) for v, g in zip(found, gone, strict=True)]
    whole = [math.floor(count + ROUNDING) for count in exact]
    return [*whole] if any(whole) else exact


def _partly(gone: Sequence[float], more: Sequence[float], share: float) -> list[int]:
    return [math.floor(a + share * b + ROUNDING) for a, b in zip(gone, more, strict=True)]


def alive(scores: Scores, masks: Scores) -> UnitMasks:
    """The scores, and -1 for what is pruned: it is chosen last."""
    return {name: s.masked_fill(~masks[name], -1.0) for name, s in scores.items()}


def energy(scores: Scores, masks: Scores) -> UnitMasks:
    """Squared scores as shares of the rest of a group, comparable between groups; -1 for what is pruned."""
    out: dict[str, Tensor] = {}
    for name, score in alive(scores, masks).items():
        squares = score.clamp(min=0) ** 2
        out[name] = torch.where(masks[name], squares / torch.clamp(squares.sum(), min=1e-30), -1.0)
    return out


def turned(curve: Sequence[float]) -> bool:
    """Whether an index that had risen is falling now: the network collapses. Changes below TURN don't count."""
    lowest, peak = math.inf, 0.0
    for value in curve:
        lowest = min(lowest, value)
        peak = max(peak, value) if value > lowest * (1 + TURN) or peak else 0.0
    return bool(curve) and peak > 0 and curve[-1] < peak * (1 - TURN)


def _impose(
    pattern: tuple[Units, Scores, Scores], masks: UnitMasks, vector: PrunedVector, count: int
) -> None:
    """Impose the pattern on the `count` blocks that lose the least sum of squares, in place."""
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
