"""Progressive removal of units by weights and bounds alone: small steps over all groups, units merged or averaged.

Meng, Bai, Teo and Dong, "Supervised Robustness-preserving Data-free Neural Network Pruning" (2022): in every step the
most similar pairs are candidates, the effect of each merge on the logits is bounded over the whole input box, and a
score of those bounds accepts or rejects it. Units that are not interchangeable (residual sums, depthwise filters) are
removed, and their mean, by batch-norm, stays in the biases. Units that are always 0 go first.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from edgeprune.bounds import Interval, Unbounded, activation_bounds
from edgeprune.methods._data_free.impact import BoundedNetwork, always_zero, logit_changes, mean_contribution
from edgeprune.methods._data_free.merging import (
    compensate,
    is_homogeneous,
    merge,
    unit_rows,
    why_not_mergeable,
)
from edgeprune.methods._data_free.pairing import Pair, greedy_matching, pair_saliency, scaled_saliency
from edgeprune.methods._data_free.selection import (
    Candidates,
    Score,
    anneal,
    greedy,
    margin_score,
    paper_score,
)
from edgeprune.models import Program, tensors
from edgeprune.progress import bar
from edgeprune.records import Group
from edgeprune.structure import channel_sums

# How the units of a group can go: merged with equal weight, merged in proportion, alone.
PLAIN, SCALED, ALONE = "plain", "scaled", "alone"
MODES = ("baseline", "greedy", "stochastic")
SCORES = ("paper", "margin")
# A step compares no fewer candidates than this, where there are so many: at a whole matching of up to 128 units.
FEWEST = 64


@dataclass(frozen=True)
class Rules:
    """The options of `DataFree`, with a resolved mode."""

    mode: str = "stochastic"
    score: str = "paper"
    alpha: float = 0.75
    step: float = 0.05
    pool: int = 4
    scaled: bool = True


@dataclass
class Thinning:
    """A network that loses units in place. alive: group -> bool (C,).

    unbounded: group -> why its candidates were chosen by saliency alone. merged, free: how many units were merged, and
    how many were always 0.
    """

    network: nn.Module
    program: Program
    groups: tuple[Group, ...]
    box: Interval
    rules: Rules
    alive: dict[str, Tensor] = field(default_factory=dict)
    unbounded: dict[str, str] = field(default_factory=dict)
    merged: int = 0
    free: int = 0

    def run(self, kept: Mapping[str, int], seed: int) -> None:
        """Remove units step by step until each group keeps as many as `kept` says; other groups do not change."""
        generator = torch.Generator().manual_seed(seed)
        self.alive = {g.name: torch.ones(g.channels, dtype=torch.bool) for g in self.groups}
        # Determined once: a parameter with an entry per channel is uneven as soon as channels are zeroed.
        ways = {g.name: _way(self.program, self.network, g, scaled=self.rules.scaled) for g in self.groups}
        excess = {g.name: g.channels - kept.get(g.name, g.channels) for g in self.groups}
        with bar(sum(excess.values()), "merge units") as advance:
            while any(excess.values()):
                for group in self.groups:
                    quota = min(excess[group.name], math.ceil(self.rules.step * group.channels))
                    if quota:
                        gone = self.step(group, quota, ways[group.name], generator)
                        assert gone, "of two units that live one can go"
                        excess[group.name] -= gone
                        advance(gone)

    def notes(self) -> tuple[str, ...]:
        """Notes on how the units went, and what could not be bounded."""
        gone = sum(int((~alive).sum()) for alive in self.alive.values())
        alone = gone - self.merged - self.free
        parts = [f"{self.merged} of {gone} units were merged into another one"]
        if self.free:
            parts.append(f"{self.free} were always 0")
        if alone:
            parts.append(
                f"{alone} went alone and left their mean, where batch-norm determines it, in the next bias"
            )
        notes = [f"Mode {self.rules.mode}: {', '.join(parts)}."]
        if self.unbounded:
            name, reason = next(iter(self.unbounded.items()))
            notes.append(
                f"{len(self.unbounded)} of {len(self.groups)} groups could not be bounded and were thinned by saliency "
                f"alone: {name}: {reason}"
            )
        return tuple(notes)

    def step(self, group: Group, quota: int, way: str, generator: torch.Generator) -> int:
        """Remove up to `quota` units of a group, or as many as there are pairs; how many went."""
        bounded = self._bounded()
        free = self._always_zero(group, bounded)[:quota]
        self._alone(group, free)
        self.free += len(free)
        rest = quota - len(free)
        if not rest:
            return len(free)
        alone = way == ALONE
        pairs = self._singles(group, rest) if alone else self._pairs(group, rest, scaled=way == SCALED)
        chosen = self._accept(group, pairs, rest, bounded, generator)
        if alone:
            self._alone(group, [pair.remove for pair in chosen])
        else:
            merge(self.network, group, chosen)
            self.alive[group.name][[pair.remove for pair in chosen]] = False
            self.merged += len(chosen)
        return len(free) + len(chosen)

    def _bounded(self) -> BoundedNetwork | None:
        if self.rules.mode == "baseline":
            return None
        with torch.no_grad():
            bounds = activation_bounds(self.program, tensors(self.network), self.box, collapsed=True)
        return BoundedNetwork(self.program, self.network, bounds)

    def _alone(self, group: Group, units: list[int]) -> None:
        if units:
            means = mean_contribution(self.program, self.network, group)
            compensate(self.program, self.network, group, units, means)
            self.alive[group.name][units] = False

    def _always_zero(self, group: Group, bounded: BoundedNetwork | None) -> list[int]:
        if bounded is None:
            return []
        try:
            found = always_zero(bounded, group)
        except Unbounded as reason:
            self.unbounded.setdefault(group.name, str(reason))
            return []
        return [unit for unit in sorted(found) if self.alive[group.name][unit]]

    def _pairs(self, group: Group, quota: int, *, scaled: bool) -> list[Pair]:
        alive = self.alive[group.name].nonzero().flatten()
        rows = unit_rows(self.network, group)
        units = (rows.incoming[alive], rows.outgoing[alive], rows.bias[alive])
        saliency, scale = scaled_saliency(*units) if scaled else (pair_saliency(*units), None)
        found = greedy_matching(saliency, self._most(quota), scale=scale)
        return [Pair(int(alive[p.keep]), int(alive[p.remove]), p.saliency, p.scale) for p in found]

    def _singles(self, group: Group, quota: int) -> list[Pair]:
        saliency = single_saliency(self.network, group)
        alive = self.alive[group.name].nonzero().flatten()
        order = alive[torch.argsort(saliency[alive], stable=True)].tolist()
        return [Pair(u, u, float(saliency[u])) for u in order[: self._most(quota)]]

    def _most(self, quota: int) -> int:
        return quota if self.rules.mode == "baseline" else max(FEWEST, self.rules.pool * quota)

    def _accept(
        self,
        group: Group,
        pairs: list[Pair],
        quota: int,
        bounded: BoundedNetwork | None,
        generator: torch.Generator,
    ) -> list[Pair]:
        if bounded is None or len(pairs) <= quota:
            return pairs[:quota]
        candidates = self._candidates(group, pairs, bounded)
        if candidates is None:
            return pairs[:quota]
        score = self._score(candidates)
        if self.rules.mode == "greedy":
            chosen = greedy(candidates, score, quota, self.rules.pool * quota)
        else:
            chosen = anneal(candidates, score, quota, generator=generator)
        return [pairs[i] for i in chosen]

    def _score(self, candidates: Candidates) -> Score:
        if self.rules.score == "margin":
            return margin_score
        return paper_score(candidates.lo, candidates.hi, self.rules.alpha)

    def _candidates(self, group: Group, pairs: list[Pair], bounded: BoundedNetwork) -> Candidates | None:
        """Bounds of each candidate's change of the logits; None where it can't be bounded."""
        try:
            found = logit_changes(bounded, group, pairs)
        except Unbounded as reason:
            self.unbounded.setdefault(group.name, str(reason))
            return None
        if not bool(torch.isfinite(found.lo).all() and torch.isfinite(found.hi).all()):
            self.unbounded.setdefault(group.name, "its bounds are too wide for floating point")
            return None
        return Candidates(found.lo, found.hi, tuple(tuple(dict.fromkeys((p.keep, p.remove))) for p in pairs))


def single_saliency(network: nn.Module, group: Group) -> Tensor:
    """Norm of the weights that make each unit times the norm of those that read it: float64 (C,)."""
    squares = {name: p.detach().double() ** 2 for name, p in network.named_parameters()}
    made = channel_sums(group, squares, ("producer", "norm"))
    return (made * channel_sums(group, squares, ("consumer",))).sqrt()


def _way(program: Program, network: nn.Module, group: Group, *, scaled: bool) -> str:
    if why_not_mergeable(program, network, group) is not None:
        return ALONE
    return SCALED if scaled and is_homogeneous(program, group) else PLAIN
