"""Progressive removal of units by weights and bounds alone: small steps over all groups, each pair merged or averaged.

Meng, Bai, Teo and Dong, "Supervised Robustness-preserving Data-free Neural Network Pruning" (2022): in every step the
pairs that differ least are candidates; what merging each one can do to the logits is bounded over the whole input box,
and a score of those bounds accepts or rejects it. Units that can't stand in for each other (residual sums, depthwise
filters) go alone, and what they are on average, by batch-norm, stays in the biases.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from edgeprune.nn.annealing import Candidates, Score, anneal, greedy, margin_score, paper_score
from edgeprune.nn.bounds import Bounds, Interval, Unbounded, activation_bounds, consumer_impact, delta_from
from edgeprune.nn.expectations import expectations
from edgeprune.nn.merging import (
    compensate,
    is_homogeneous,
    merge,
    unit_rows,
    why_not_mergeable,
)  # fmt: skip
from edgeprune.nn.pairs import Pair, greedy_matching, pair_saliency, scaled_saliency
from edgeprune.nn.paths import follow
from edgeprune.nn.progress import bar
from edgeprune.nn.readers import bias_of, tensors_of
from edgeprune.nn.tracing import Call, Program
from edgeprune.nn.units import channel_sums
from edgeprune.records import Group

MODES = ("baseline", "greedy", "stochastic")
SCORES = ("paper", "margin")
# Candidates whose bounds are propagated at a time.
BATCH = 256
# A step looks at no fewer candidates than this, where there are so many.
FEWEST = 64


@dataclass(frozen=True)
class Rules:
    """mode: of MODES. score: of SCORES. alpha: the share of the widths in the paper's score.

    step: share of a group that goes in one step. pool: candidates of a step, times its quota. scaled: whether a unit
    may take over another one's work in proportion.
    """

    mode: str = "stochastic"
    score: str = "paper"
    alpha: float = 0.75
    step: float = 0.05
    pool: int = 4
    scaled: bool = True


@dataclass
class Thinning:
    """A network that loses units in place. alive: group -> bool (C,). notes: what was and was not bounded."""

    network: nn.Module
    program: Program
    groups: tuple[Group, ...]
    box: Interval
    rules: Rules
    alive: dict[str, Tensor] = field(default_factory=dict)
    unbounded: dict[str, str] = field(default_factory=dict)
    merged: int = 0

    def run(self, kept: Mapping[str, int], seed: int) -> None:
        """Remove units step by step until each group keeps as many as told."""
        generator = torch.Generator().manual_seed(seed)
        self.alive = {g.name: torch.ones(g.channels, dtype=torch.bool) for g in self.groups}
        total = sum(g.channels - kept.get(g.name, g.channels) for g in self.groups)
        with bar(total, "merge units") as advance:
            while True:
                waiting = [
                    g for g in self.groups if int(self.alive[g.name].sum()) > kept.get(g.name, g.channels)
                ]
                if not waiting:
                    return
                bounds = self._bounds()
                for group in waiting:
                    left = int(self.alive[group.name].sum()) - kept[group.name]
                    quota = min(left, math.ceil(self.rules.step * group.channels))
                    advance(self._step(group, quota, bounds, generator))

    def said(self) -> tuple[str, ...]:
        """How the units went, and what could not be bounded."""
        gone = sum(int((~alive).sum()) for alive in self.alive.values())
        notes = [
            f"Mode {self.rules.mode}: {self.merged} of {gone} units were merged into another one, the others went "
            "alone and left their mean, as batch-norm tells it, in the next layer's bias."
        ]
        if self.unbounded:
            name, reason = next(iter(self.unbounded.items()))
            notes.append(
                f"{len(self.unbounded)} of {len(self.groups)} groups could not be bounded and were thinned by saliency "
                f"alone: {name}: {reason}"
            )
        return tuple(notes)

    def _bounds(self) -> Bounds | None:
        if self.rules.mode == "baseline":
            return None
        with torch.no_grad():
            return activation_bounds(self.program, tensors_of(self.network), self.box, collapsed=True)

    def _step(self, group: Group, quota: int, bounds: Bounds | None, generator: torch.Generator) -> int:
        """Remove up to `quota` units of a group; how many went."""
        if why_not_mergeable(self.program, self.network, group) is None:
            pairs = self._pairs(group, quota)
            chosen = self._accept(group, pairs, quota, bounds, generator)
            merge(self.network, group, chosen)
            gone = [pair.remove for pair in chosen]
            self.merged += len(gone)
        else:
            pairs = self._singles(group, quota)
            chosen = self._accept(group, pairs, quota, bounds, generator)
            gone = [pair.remove for pair in chosen]
            compensate(self.program, self.network, group, gone, self._means(group))
        self.alive[group.name][gone] = False
        return len(gone)

    def _pairs(self, group: Group, quota: int) -> list[Pair]:
        """Merges of two living units, in ascending saliency."""
        alive = self.alive[group.name].nonzero().flatten()
        rows = unit_rows(self.network, group)
        incoming, outgoing, bias = rows.incoming[alive], rows.outgoing[alive], rows.bias[alive]
        if self.rules.scaled and is_homogeneous(self.program, group):
            saliency, scale = scaled_saliency(incoming, outgoing, bias)
            found = greedy_matching(saliency, self._most(quota), scale=scale)
        else:
            found = greedy_matching(pair_saliency(incoming, outgoing, bias), self._most(quota))
        return [Pair(int(alive[p.keep]), int(alive[p.remove]), p.saliency, p.scale) for p in found]

    def _singles(self, group: Group, quota: int) -> list[Pair]:
        """Single living units in ascending saliency: the norm of what makes them times that of what reads them."""
        saliency = single_saliency(self.network, group)
        alive = self.alive[group.name].nonzero().flatten()
        order = alive[torch.argsort(saliency[alive], stable=True)].tolist()
        return [Pair(u, u, float(saliency[u]), 1.0) for u in order[: self._most(quota) or len(order)]]

    def _most(self, quota: int) -> int | None:
        if self.rules.mode == "baseline":
            return quota
        return max(FEWEST, self.rules.pool * quota)

    def _accept(
        self, group: Group, pairs: list[Pair], quota: int, bounds: Bounds | None, generator: torch.Generator
    ) -> list[Pair]:
        if bounds is None or len(pairs) <= quota:
            return pairs[:quota]
        candidates = self._candidates(group, pairs, bounds)
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

    def _candidates(self, group: Group, pairs: Sequence[Pair], bounds: Bounds) -> Candidates | None:
        """What each candidate can do to the logits; None where it can't be bounded."""
        state = tensors_of(self.network)
        found: list[Interval] = []
        try:
            with torch.no_grad():
                for start in range(0, len(pairs), BATCH):
                    part = pairs[start : start + BATCH]
                    starts = self._impacts(group, part, bounds)
                    found.append(delta_from(self.program, state, bounds, starts))
        except Unbounded as reason:
            self.unbounded.setdefault(group.name, str(reason))
            return None
        lo, hi = torch.cat([i.lo for i in found]).double(), torch.cat([i.hi for i in found]).double()
        if not bool(torch.isfinite(lo).all() and torch.isfinite(hi).all()):
            self.unbounded.setdefault(group.name, "its bounds are too wide for floating point")
            return None
        return Candidates(
            lo, hi, tuple((p.keep, p.remove) if p.keep != p.remove else (p.remove,) for p in pairs)
        )

    def _impacts(self, group: Group, pairs: Sequence[Pair], bounds: Bounds) -> dict[str, Interval]:
        if pairs[0].keep != pairs[0].remove:
            return self._merge_impact(group, pairs, bounds)
        means = self._means(group)
        starts = {}
        for call, positions in self._reads(group):
            at = bounds.intervals.get(call.reads[0])
            if at is None:
                raise bounds.causes[call.reads[0]]
            axis = at.lo.ndim - 1 if call.op == "linear" else 1
            lo, hi = (t.movedim(axis, 0).flatten(1) for t in (at.lo, at.hi))
            chosen = [positions[p.remove] for p in pairs]
            low = torch.stack([lo[list(c)].min() for c in chosen])
            high = torch.stack([hi[list(c)].max() for c in chosen])
            left = means[call.weights[0].rpartition(".")[0]].to(low)
            mid = torch.stack([left[list(c)].mean() for c in chosen])
            starts[call.name] = consumer_impact(
                self.program, tensors_of(self.network), call, chosen, Interval(mid - high, mid - low)
            )
        return starts

    def _merge_impact(self, group: Group, pairs: Sequence[Pair], bounds: Bounds) -> dict[str, Interval]:
        """Merging r into s puts scale * u_s where u_r was, in front of the activation.

        The difference of the two rows, bounded over the layer's inputs, is much tighter than that of their bounds, and
        0 for duplicates; both hold, so their intersection does.
        """
        path = follow(self.program, group)
        assert not isinstance(path, str), "the group is mergeable"
        source = path.producer.reads[0]
        at = bounds.intervals.get(source)
        if at is None:
            raise bounds.causes[source]
        rows = unit_rows(self.network, group)
        keep, gone = (torch.tensor([getattr(p, side) for p in pairs]) for side in ("keep", "remove"))
        scale = torch.tensor([p.scale for p in pairs], dtype=torch.float64)
        low, high = _per_entry(at, path.producer, rows.incoming.shape[1])
        difference = scale[:, None] * rows.incoming[keep] - rows.incoming[gone]
        constant = scale * rows.bias[keep] - rows.bias[gone]
        close = _affine(difference, constant, low, high)
        own = _affine(rows.incoming, rows.bias, low, high)
        apart = Interval(scale * own.lo[keep] - own.hi[gone], scale * own.hi[keep] - own.lo[gone])
        lo, hi = torch.maximum(close.lo, apart.lo), torch.minimum(close.hi, apart.hi)
        lo, hi = torch.minimum(lo, hi), torch.maximum(lo, hi)
        end = self._behind_norm(path.producer)
        size = end.shape[1] if end.op != "linear" else end.shape[-1]
        starts = torch.zeros(2, len(pairs), size, dtype=self.box.lo.dtype)
        index = torch.arange(len(pairs))
        starts[0, index, gone], starts[1, index, gone] = lo.to(starts.dtype), hi.to(starts.dtype)
        behind = max(0, len(end.shape) - 2)
        shape = (
            (len(pairs), *(1,) * behind, size) if end.op == "linear" else (len(pairs), size, *(1,) * behind)
        )
        return {end.name: Interval(starts[0].reshape(shape), starts[1].reshape(shape))}

    def _behind_norm(self, producer: Call) -> Call:
        users = self.program.users(producer.name)
        return users[0] if len(users) == 1 and users[0].op == "batch_norm" else producer

    def _reads(self, group: Group) -> list[tuple[Call, tuple[tuple[int, ...], ...]]]:
        """The calls that read the group's units, and the input entries of each unit."""
        return [
            (call, member.positions)
            for member in group.members if member.role == "consumer"
            for call in self.program.readers(member.tensor)
        ]  # fmt: skip

    def _means(self, group: Group) -> dict[str, Tensor]:
        """What each reader gets on average per input channel, as far as batch-norms say it; 0 elsewhere."""
        expected = expectations(self.program, tensors_of(self.network))
        found = {}
        for call, _ in self._reads(group):
            path = call.weights[0].rpartition(".")[0]
            size = self.program.shape_of(call.reads[0])[-1 if call.op == "linear" else 1]
            moments = expected.get(call.reads[0])
            free = bias_of(self.program, self.network, path).free
            known = moments is not None and len(moments.mean) == size and free
            found[path] = moments.mean if known and moments is not None else torch.zeros(size).double()
        return found


def single_saliency(network: nn.Module, group: Group) -> Tensor:
    """Norm of what makes each unit times the norm of what reads it: float64 (C,)."""
    squares = {name: p.detach().double() ** 2 for name, p in network.named_parameters()}
    made = channel_sums(group, squares, ("producer", "norm"))
    return (made * channel_sums(group, squares, ("consumer",))).sqrt()


def _per_entry(at: Interval, producer: Call, width: int) -> tuple[Tensor, Tensor]:
    """The bounds of each entry of a patch that a layer multiplies with its rows: two of float64 (F,)."""
    if producer.op == "linear":
        return at.lo.reshape(-1).double().expand(width), at.hi.reshape(-1).double().expand(width)
    lo, hi = at.lo[0].flatten(1).amin(1).double(), at.hi[0].flatten(1).amax(1).double()
    padding = producer.arg("padding")
    if padding == "same" or (padding != "valid" and any(padding)):
        lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    taps = width // len(lo)
    return lo.repeat_interleave(taps), hi.repeat_interleave(taps)


def _affine(rows: Tensor, constant: Tensor, low: Tensor, high: Tensor) -> Interval:
    """Bounds of rows . x + constant over low <= x <= high, widened for rounding."""
    center, radius = rows @ ((low + high) / 2) + constant, rows.abs() @ ((high - low) / 2)
    slack = 1e-12 * (radius + rows.abs() @ ((low + high) / 2).abs() + constant.abs())
    return Interval(center - radius - slack, center + radius + slack)
