"""Which units a sparse network trades between epochs, on an exact budget.

Dynamic network rewiring (Kundu et al. 2021): each layer removes its weakest units, and as many grow in the layers with
the largest momentum. Ties are broken by flat index.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from edgeprune.structure import drop_smallest

# 0.29 * 100 is 28.999999999999996 in binary.
ROUNDING = 1e-9


@dataclass(frozen=True)
class Rewired:
    """The result of a rewiring.

    masks: name -> bool (n,). stayed: the old mask without what was removed; the rest of masks starts at zero. removed,
    grown: counts per name. shares: of the regrowth, summing to 1; empty where the pattern fixes them.
    """

    masks: dict[str, Tensor]
    stayed: dict[str, Tensor]
    removed: dict[str, int]
    grown: dict[str, int]
    shares: dict[str, float]


def pruning_rate(start: float, epoch: int, epochs: float) -> float:
    """The share of active units removed after an epoch: p_0 (1 - e / E), e counted from 0."""
    return max(0.0, start * (1 - epoch / epochs))


def largest_remainder(
    shares: Sequence[float], total: int, caps: Sequence[int], floors: Sequence[int] = ()
) -> list[int]:
    """Whole numbers in proportion to shares: exactly `total` together, none above its cap or below its floor.

    Each gets its quota rounded down, and those with the largest remainders one more (of equal ones the first). What
    caps and floors change is shared among the others. Shares that are all 0 count as the caps.
    """
    if any(not math.isfinite(s) or s < 0 for s in shares):
        raise ValueError(f"shares must be finite and not negative, got {list(shares)}")
    least = list(floors) or [0] * len(caps)
    if not sum(least) <= total <= sum(caps):
        raise ValueError(f"{total} can't be shared out with at least {least} and at most {list(caps)}")
    fixed: dict[int, int] = {}
    while True:
        rest = [i for i in range(len(caps)) if i not in fixed]
        counts = _capped([shares[i] for i in rest], total - sum(fixed.values()), [caps[i] for i in rest])
        found = dict(zip(rest, counts, strict=True))
        below = {i: least[i] for i, count in found.items() if count < least[i]}
        if not below:
            return [fixed[i] if i in fixed else found[i] for i in range(len(caps))]
        fixed.update(below)


def normalized(means: Mapping[str, float], sizes: Mapping[str, int]) -> dict[str, float]:
    """Mean |momentum| of each layer as a share of all layers; by `sizes` where it is 0 or not finite."""
    usable: Mapping[str, float] = means
    if not math.isfinite(sum(means.values())) or sum(means.values()) <= 0:
        usable = {name: float(sizes[name]) for name in means}
    total = sum(usable.values())
    return {name: value / total for name, value in usable.items()}


def rewire(
    masks: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    momenta: Mapping[str, Tensor],
    rate: float,
    floors: Mapping[str, int] | None = None,
) -> Rewired:
    """Trade single weights: in every layer the smallest |w| go, and as many grow where the momentum is largest.

    A layer removes floor(rate * active). The sum is shared by normalized momentum (largest remainder, at most what a
    layer has free) and goes to the largest |momentum| of the inactive positions, those just removed among them.

    Args:
        masks: name -> bool (n,). weights, momenta: name -> a tensor of n entries, in row-major order.
        floors: name -> the least that stay active; a layer with fewer keeps what it has.
    """
    means = {
        name: float(momenta[name].detach().reshape(-1).abs().cpu()[mask].double().mean())
        if mask.any()
        else 0.0
        for name, mask in masks.items()
    }
    shares = normalized(means, {name: len(mask) for name, mask in masks.items()})
    removed = {name: math.floor(rate * int(m.sum()) + ROUNDING) for name, m in masks.items()}
    stayed = {name: drop_smallest(magnitude(weights[name]), m, removed[name]) for name, m in masks.items()}
    active = {name: int(m.sum()) for name, m in stayed.items()}
    least = {
        name: max(0, min((floors or {}).get(name, 0), int(m.sum())) - active[name])
        for name, m in masks.items()
    }
    free = {name: len(m) - active[name] for name, m in masks.items()}
    counts = largest_remainder(
        list(shares.values()), sum(removed.values()), list(free.values()), list(least.values())
    )
    grown = dict(zip(masks, counts, strict=True))
    new = {name: with_largest(magnitude(momenta[name]), m, grown[name]) for name, m in stayed.items()}
    return Rewired(new, stayed, removed, grown, shares)


def rewire_blocks(
    masks: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    momenta: Mapping[str, Tensor],
    blocks: Mapping[str, Tensor],
    rate: float,
) -> Rewired:
    """Trade weights within blocks of four, two of which are active before and after.

    In floor(rate * blocks) blocks of a layer, those whose weaker active weight is smallest, that weight goes, and the
    largest |momentum| among the three free positions comes.
    """
    new = {name: m.clone() for name, m in masks.items()}
    stayed = {name: m.clone() for name, m in masks.items()}
    counts: dict[str, int] = {}
    for name, mask in masks.items():
        where = blocks[name]
        weak, position = magnitude(weights[name])[where].masked_fill(~mask[where], math.inf).min(1)
        count = counts[name] = math.floor(rate * len(where) + ROUNDING)
        chosen = torch.argsort(weak, stable=True)[:count]
        going = where[chosen, position[chosen]]
        stayed[name][going] = False
        new[name][going] = False
        others = where[chosen]
        strongest = magnitude(momenta[name])[others].masked_fill(new[name][others], -1.0).argmax(1)
        new[name][others[torch.arange(count), strongest]] = True
    return Rewired(new, stayed, counts, dict(counts), {})


def magnitude(values: Tensor) -> Tensor:
    """|values| as float64 (n,) on the CPU; NaN counts as 0."""
    return torch.nan_to_num(values.detach().reshape(-1).double().abs().cpu(), nan=0.0)


def with_largest(scores: Tensor, mask: Tensor, count: int) -> Tensor:
    """A mask with `count` more units: the largest scores that it lacks, the first of equal ones."""
    out = mask.clone()
    out[torch.argsort(scores.masked_fill(mask, -1.0), descending=True, stable=True)[:count]] = True
    return out


def _capped(shares: Sequence[float], total: int, caps: Sequence[int]) -> list[int]:
    """Largest remainders below caps: full ones drop out until none is, then quotas are rounded."""
    out = [0] * len(caps)
    open_ = list(range(len(caps)))
    while True:
        # Fractions: with floats, equal shares could end as unequal remainders and break ties by noise.
        weights = {i: Fraction(shares[i]) for i in open_}
        if not sum(weights.values()):
            weights = {i: Fraction(caps[i]) for i in open_}
        whole = sum(weights.values()) or Fraction(1)
        rest = total - sum(out)
        quotas = {i: rest * weight / whole for i, weight in weights.items()}
        full = [i for i in open_ if quotas[i] > caps[i]]
        if not full:
            break
        for i in full:
            out[i] = caps[i]
        open_ = [i for i in open_ if i not in full]
    for i in open_:
        out[i] = math.floor(quotas[i])
    short = total - sum(out)
    for i in sorted((i for i in open_ if out[i] < caps[i]), key=lambda i: (out[i] - quotas[i], i))[:short]:
        out[i] += 1
    return out


@dataclass(frozen=True)
class ChannelBudget:
    """The budget of the kept channels.

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
        """The unspent share of each limit, summed; -inf when one is exceeded."""
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

    A group removes floor(rate * active). It grows back at least to one of its levels, and then by its share of the
    freed cost; the rest is spent on the most momentum per cost that still fits. Afterwards every count is a level,
    every limit holds, and no group could go up a level without exceeding one.

    Args:
        norms, momenta: group -> float64 (C,).
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
    """Raise counts, level by level, until no group can go up without exceeding a limit.

    First each group by its share of the unspent cost, then whichever gains most per cost.

    Args:
        gains: group -> float64 (C,), the gain of the k-th channel; only those beyond kept are used.
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
    """The gain of the k-th channel: 0 for the active ones, then the strengths of the others, falling."""
    others = torch.sort(strength[~active], descending=True).values
    return torch.cat([torch.zeros(int(active.sum()), dtype=torch.float64), others])
