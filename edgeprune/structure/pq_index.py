"""The PQ index: how sparse a vector is, how many of its entries matter, and how layers share a budget by it.

Diao et al., "Pruning Deep Neural Networks from a Sparsity Perspective" (ICLR 2023). In float64 on magnitudes over their
largest one, as the log of a ratio of power means: d ** (1/q - 1/p) can't overflow, and an index next to 1 keeps its
digits.
"""

import math
from collections.abc import Hashable, Mapping
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from edgeprune.errors import ModelError, UsageError
from edgeprune.structure.allocation import round_to_total

# k equal weights make the bound k + 1e-12 or k - 1e-12; both mean k.
ROUNDING = 1e-6
HALVINGS = 100

K = TypeVar("K", bound=Hashable)


class Count(NamedTuple):
    """pqi: the PQ index in [0, 1). bound: how many entries matter at least, a real number. pruned: whole entries."""

    pqi: float
    bound: float
    pruned: int


def pqi(w: Tensor, p: float = 0.5, q: float = 1.0) -> float:
    """Definition 1: 1 - d ** (1/q - 1/p) * |w|_p / |w|_q, larger for sparser vectors.

    Returns:
        In [0, 1 - d ** (1/q - 1/p)]: 0 for equal magnitudes, the largest for a single entry that is not zero. A vector
        of zeros, or of nothing, has no index; 0 stands for it, so that nothing is pruned because of it.
    """
    return abs(math.expm1(_log_ratio(w, p, q)))


def sap_count(
    w: Tensor, p: float = 0.5, q: float = 1.0, *, eta: float = 0.0, gamma: float = 1.0, beta: float = 0.9
) -> Count:
    """How many of the entries that are left go next (Algorithm 1): floor(d * min(gamma * (1 - r / d), beta)).

    Args:
        p, q: orders of the index. eta: what the entries beyond r may hold, as a share of the others. gamma: factor on
            the share that goes. beta: the largest share that goes at once, below 1.

    Returns:
        The index, the bound r, and c in [0, floor(beta d)]: a vector is never emptied.
    """
    check_rule(p, q, eta, gamma, beta)
    log_ratio, d = _log_ratio(w, p, q), w.numel()
    share = math.exp((q * p * log_ratio - q * math.log1p(eta)) / (q - p))
    index = abs(math.expm1(log_ratio))
    if d == 0 or not bool(w.detach().any()):
        return Count(0.0, float(d), 0)
    pruned = min(gamma * (1 - share), beta)
    return Count(index, d * share, min(math.floor(d * pruned + ROUNDING), d - 1))


def superfluous(w: Tensor, p: float = 0.5, q: float = 1.0, eta: float = 0.0) -> Tensor:
    """The share 1 - r / n that Theorem 2 leaves out of the n largest magnitudes, for every n at once."""
    check_rule(p, q, eta, gamma=1.0, beta=0.5)
    flat = _scaled(w).sort(descending=True).values
    n = torch.arange(1, len(flat) + 1, dtype=torch.float64, device=flat.device)
    logs = [(flat.pow(order).cumsum(0) / n).log() / order for order in (p, q)]
    exponent = (q * p * (logs[0] - logs[1]).clamp(max=0) - q * math.log1p(eta)) / (q - p)
    shares = torch.where(flat[:1] > 0, -torch.expm1(exponent), 0.0)
    return torch.cat([shares.new_zeros(1), shares])


def keep_shares(scores: Mapping[str, Tensor], p: float = 0.5, q: float = 1.0) -> dict[str, float]:
    """The share of each layer that its own scores say it needs: 1 - c / d of `sap_count`."""
    return {
        name: 1 - sap_count(values, p, q).pruned / max(1, values.numel()) for name, values in scores.items()
    }


def share_out(
    wanted: Mapping[K, float], total: int, least: Mapping[K, int], most: Mapping[K, int]
) -> dict[K, int]:
    """Whole numbers in proportion to wishes, within bounds, that add up to a total.

    One factor on all wishes is found by bisection; largest remainders round, of equal ones the first.

    Args:
        wanted: > 0 wherever `most` is more than `least`.
    """

    def scaled(factor: float) -> dict[K, float]:
        return {name: min(max(factor * w, least[name]), most[name]) for name, w in wanted.items()}

    # With the largest factor everybody has the most.
    below, above = 0.0, max((most[name] / w for name, w in wanted.items() if w > 0), default=0.0)
    for _ in range(HALVINGS):
        middle = (below + above) / 2
        if sum(scaled(middle).values()) < total:
            below = middle
        else:
            above = middle
    return round_to_total(scaled(above), total, least, most)


def check_orders(p: float, q: float) -> None:
    """Refuse orders that make no index."""
    if not 0 < p < q < math.inf:
        raise UsageError(f"the PQ index needs 0 < p < q, got p = {p:g} and q = {q:g}", "try p = 0.5, q = 1")


def check_rule(p: float, q: float, eta: float, gamma: float, beta: float) -> None:
    """Refuse what makes no pruning rule."""
    check_orders(p, q)
    ranges = (
        ("eta", eta, 0 <= eta < math.inf, "at least 0"),
        ("gamma", gamma, 0 < gamma < math.inf, "more than 0"),
        ("beta", beta, 0 < beta < 1, "between 0 and 1, both excluded"),
    )
    for name, value, right, accepted in ranges:
        if not right:
            raise UsageError(
                f"{name} = {value:g} must be {accepted}", "the paper has eta 0, gamma 1, beta 0.9"
            )


def _log_ratio(w: Tensor, p: float, q: float) -> float:
    """log(1 - I), the log of the ratio of the power means: 1 - I itself rounds to 0 for very sparse vectors."""
    check_orders(p, q)
    flat = _scaled(w)
    if not bool(flat.any()):
        return 0.0
    means = [math.log(float(flat.pow(order).mean())) / order for order in (p, q)]
    # Power means grow with their order, so only rounding can make the ratio more than 1.
    return min(0.0, means[0] - means[1])


def _scaled(w: Tensor) -> Tensor:
    flat = w.detach().flatten().double().abs()
    if not bool(torch.isfinite(flat).all()):
        bad = int((~torch.isfinite(flat)).sum())
        raise ModelError(
            f"the PQ index of {flat.numel()} numbers of which {bad} are not finite is not defined",
            "has the training diverged? lower the learning rate",
        )
    largest = float(flat.max()) if flat.numel() else 0.0
    return flat / largest if largest else flat
