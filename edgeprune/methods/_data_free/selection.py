"""Which candidates of a list go: scores of the bounds of their logit changes, and two ways to choose by them.

A candidate is a pair to merge or a unit to remove. After Meng, Bai, Teo, Dong, "Supervised Robustness-preserving
Data-free Neural Network Pruning": a small and nearly uniform shift of all logits does not change the class.

Ours: a candidate is judged by the *mean* bounds per accepted candidate, (sum + candidate) / (accepted + 1): the widths
of a sum only grow, so against the sum hardly any second candidate would be "no worse". The change of that mean times
accepted + 1 is the candidate's own excess over the mean of the others. The temperature falls as the quota fills up,
from the spread of single scores; rejected candidates are tried again, until a pass accepts none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from edgeprune.errors import EdgepruneError

Score = Callable[[Tensor, Tensor], Tensor]
"""Lower and upper bounds (B, K) of changes of the logits -> float64 (B,); smaller is better."""

_WARM_UP = 32
_ROUNDING = 1e-9
_BLOCK_BYTES = 32 * 2**20
_MOST_AT_ONCE = 64
_MOST_LOGITS = 128


@dataclass(frozen=True, eq=False)
class Candidates:
    """What may go, in ascending saliency.

    lo, hi: float64 (n, K), finite, bounds of each candidate's change of K logits. units: the units that each one uses;
    of two candidates that share a unit only one is accepted.
    """

    lo: Tensor
    hi: Tensor
    units: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if self.lo.ndim != 2 or self.lo.shape != self.hi.shape or len(self.units) != len(self.lo):
            raise EdgepruneError(
                f"bounds (n, K) and n tuples of units are needed, got {tuple(self.lo.shape)}, "
                f"{tuple(self.hi.shape)} and {len(self.units)}"
            )
        if not bool(torch.isfinite(self.lo).all() and torch.isfinite(self.hi).all()):
            raise EdgepruneError(
                "a bound of a candidate is not finite", "choose by saliency alone: mode baseline"
            )
        if bool((self.lo > self.hi).any()):
            row = int((self.lo > self.hi).any(1).nonzero()[0])
            raise EdgepruneError(f"the lower bound of candidate {row} is above its upper bound")


def entropy(lo: Tensor, hi: Tensor, threshold: float = 0.9) -> Tensor:
    """How dissimilar the bounds of the logits are: -sum_i p_i ln p_i.

    p_i is the share of logits j (i included) with similarity 1 - (|lo_i - lo_j| + |hi_i - hi_j|) / (2 U) of at least
    `threshold`, U the width of the hull of all bounds and 0. No probability distribution: up to n / e for n logits.
    Of more than 128 logits, i runs over 128 that are spread evenly.
    """
    points = torch.stack([lo, hi], 2).double()
    hull = (points.amax((1, 2)).clamp_min(0) - points.amin((1, 2)).clamp_max(0))[:, None, None]
    points = points / torch.where(hull > 0, hull, 1.0)
    classes = points.shape[1]
    chosen = (
        torch.linspace(0, max(0, classes - 1), min(classes, _MOST_LOGITS), dtype=torch.float64).round().long()
    )
    rows = max(1, _BLOCK_BYTES // (16 * max(1, classes * len(chosen))))
    counts = [
        # A similarity on the threshold counts on every machine, whatever its last digit.
        (torch.cdist(part[:, chosen], part, p=1) / 2 <= 1 - threshold + 1e-12).sum(2)
        for part in points.split(rows)
    ]
    share = torch.cat(counts).double() / max(1, classes)
    return -torch.special.xlogy(share, share).sum(1) * (classes / max(1, len(chosen))) + 0.0


def paper_score(lo: Tensor, hi: Tensor, alpha: float = 0.75) -> Score:
    """The paper's score, alpha L + (1 - alpha) ENT, with L and ENT as ranks in a list of candidates.

    L is the sum of the widths over all logits. The paper puts both through a sigmoid, which is 1 to the last digit for
    every L of a real network; instead each is replaced by its rank in the list, in [0, 1], ties at their mean. Values
    that are not in the list are interpolated between their neighbours' ranks, and extrapolated with the mean slope.

    Args:
        lo, hi: (n, K), bounds of single candidates. alpha: in [0, 1], the share of L.
    """
    width_rank, entropy_rank = _Ranks.among((hi - lo).double().sum(1)), _Ranks.among(entropy(lo, hi))

    def score(low: Tensor, high: Tensor) -> Tensor:
        widths = (high - low).double().sum(1)
        return alpha * width_rank(widths) + (1 - alpha) * entropy_rank(entropy(low, high))

    return score


def margin_score(lo: Tensor, hi: Tensor) -> Tensor:
    """R = max over logits i != j of hi_i - lo_j: the most that one logit can gain on another.

    R below the margin between the best and the second logit never changes the class. With a single logit the width.
    """
    lo, hi = lo.double(), hi.double()
    if lo.shape[1] == 1:
        return (hi - lo)[:, 0]
    most, least = hi.topk(2, 1), lo.topk(2, 1, largest=False)
    apart = most.indices[:, 0] != least.indices[:, 0]
    second = torch.maximum(most.values[:, 0] - least.values[:, 1], most.values[:, 1] - least.values[:, 0])
    return torch.where(apart, most.values[:, 0] - least.values[:, 0], second)


def greedy(candidates: Candidates, score: Score, quota: int, pool: int) -> list[int]:
    """Repeatedly the candidate with the best joint score with those accepted, of the first `pool` of the list.

    When the pool's units are used up before the quota is met, the rest of the list fills it in order.
    """
    state = _State(candidates, quota)
    waiting = list(range(min(pool, len(candidates.units))))
    while not state.full:
        waiting = [i for i in waiting if state.is_free(i)]
        if not waiting:
            break
        scores = state.scores(score, waiting)
        # The first of those that tie: which one `argmin` gives is not promised.
        best = int((scores <= _with_slack(float(scores.min()))).nonzero()[0])
        state.accept(waiting[best])
    state.fill(range(len(candidates.units)))
    return state.accepted


def anneal(
    candidates: Candidates,
    score: Score,
    quota: int,
    *,
    generator: torch.Generator,
    start_temperature: float | None = None,
) -> list[int]:
    """Walk through the list and accept what does not worsen the score, or worsens it with falling probability.

    exp(-(accepted + 1) (new - current) / T) with T = start (1 - accepted / quota); the first is always accepted.
    Rejected candidates are tried again until the quota is met; when a pass accepts none the list fills it in order.

    Args:
        generator: one float64 per candidate, so that a seed decides the same on every machine.
        start_temperature: in units of the score; 0 is hill climbing, infinity the order of the list, None the
            standard deviation of the scores of the first 32 candidates.
    """
    state = _State(candidates, quota)
    start = start_temperature
    if start is None:
        first = score(candidates.lo[:_WARM_UP], candidates.hi[:_WARM_UP])
        start = float(first.std(correction=0)) if len(first) else 0.0
    current: float | None = None
    waiting, walked = list(range(len(candidates.units))), -1
    while not state.full and len(state.accepted) > walked:
        walked = len(state.accepted)
        rejected: list[int] = []
        for index, value in _scored(state, score, waiting):
            chance = float(torch.rand(1, generator=generator, dtype=torch.float64))
            if (
                current is None
                or value <= _with_slack(current)
                or chance < _odds(value - current, start, state)
            ):
                state.accept(index)
                current = value
            else:
                rejected.append(index)
            if state.full:
                break
        waiting = rejected
    state.fill(range(len(candidates.units)))
    return state.accepted


def _odds(change: float, start: float, state: _State) -> float:
    """The probability to accept a change of the mean score: 0 at a temperature of 0, 1 at infinity."""
    temperature = start * (1 - len(state.accepted) / state.quota)
    return math.exp(-change * (len(state.accepted) + 1) / temperature) if temperature > 0 else 0.0


def _with_slack(value: float) -> float:
    return value + 1e-12 * max(1.0, abs(value))


def _scored(state: _State, score: Score, waiting: list[int]) -> Iterator[tuple[int, float]]:
    ahead: dict[int, float] = {}
    accepted, many = len(state.accepted), 1
    for place, index in enumerate(waiting):
        if not state.is_free(index):
            continue
        if len(state.accepted) != accepted:
            ahead, accepted, many = {}, len(state.accepted), 1
        if index not in ahead:
            part = waiting[place : place + many]
            ahead = dict(zip(part, state.scores(score, part).tolist(), strict=True))
            many = min(2 * many, _MOST_AT_ONCE)
        yield index, ahead[index]


@dataclass
class _State:
    """What is accepted so far: indices, the units used, the sums of the bounds."""

    candidates: Candidates
    quota: int
    accepted: list[int] = field(default_factory=list)
    used: set[int] = field(default_factory=set)
    lo: Tensor | float = 0.0
    hi: Tensor | float = 0.0

    @property
    def full(self) -> bool:
        """Whether the quota is met."""
        return len(self.accepted) >= self.quota

    def is_free(self, index: int) -> bool:
        """Whether none of a candidate's units is used."""
        return self.used.isdisjoint(self.candidates.units[index])

    def accept(self, index: int) -> None:
        """Add a candidate."""
        self.accepted.append(index)
        self.used.update(self.candidates.units[index])
        self.lo = self.lo + self.candidates.lo[index].double()
        self.hi = self.hi + self.candidates.hi[index].double()

    def fill(self, order: range) -> None:
        """Accept free candidates in the order of the list until the quota is met."""
        taken = set(self.accepted)
        for index in order:
            if self.full:
                return
            if index not in taken and self.is_free(index):
                self.accept(index)

    def scores(self, score: Score, indices: list[int]) -> Tensor:
        """The score of the mean bounds per candidate if each of these were the next one."""
        count = len(self.accepted) + 1
        return score(
            (self.lo + self.candidates.lo[indices].double()) / count,
            (self.hi + self.candidates.hi[indices].double()) / count,
        )


@dataclass(frozen=True)
class _Ranks:
    """Ranks in [0, 1] of the values of a list, as a piecewise linear, strictly increasing map of any value."""

    values: Tensor
    ranks: Tensor
    grain: float

    @staticmethod
    def among(values: Tensor) -> _Ranks:
        """The map of a list (n,); values that differ only in rounding have one rank."""
        grain = _ROUNDING * ((float(values.abs().max()) if len(values) else 0.0) or 1.0)
        distinct, counts = torch.unique((values / grain).round(), return_counts=True)
        middle = counts.cumsum(0).double() - (counts.double() + 1) / 2
        return _Ranks(distinct, middle / max(1, len(values) - 1), grain)

    def __call__(self, values: Tensor) -> Tensor:
        values = (values / self.grain).round()
        if not len(self.values):
            return torch.zeros_like(values)
        first, last = self.values[0], self.values[-1]
        width = float(last - first) or float(last.abs()) or 1 / self.grain
        below, above = (first - values).clamp_min(0) / width, (values - last).clamp_min(0) / width
        if len(self.values) == 1:
            return self.ranks + above - below
        place = torch.searchsorted(self.values, values, right=True).clamp(1, len(self.values) - 1)
        left, right = self.values[place - 1], self.values[place]
        share = ((values - left) / (right - left)).clamp(0, 1)
        return torch.lerp(self.ranks[place - 1], self.ranks[place], share) + above - below
