"""Pair saliency: the loss of merging one unit of a group into another, and a matching of the pairs.

Merging unit r into unit s (w_s += c w_r, w_r = 0) changes the next layer by (c h_s - h_r) w_r, and because ReLU-like
activations are 1-Lipschitz |c h_s - h_r| <= ||c W_s - W_r|| ||x|| on rows that carry the bias as one more weight.
After Meng, Bai, Teo, Dong, "Supervised Robustness-preserving Data-free Neural Network Pruning", and Srinivas and
Babu, "Data-free parameter pruning for Deep Neural Networks" (2015). Ours: the bias is part of the row (the published
code's ratio |b_i - b_j| / |b_i + b_j| is 0/0 without biases), both directions of a pair are tried, and a unit may
be a multiple of another one.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from edgeprune.errors import ModelError

# Distances from the Gram matrix lose digits where two rows nearly agree; below this share of ||W_i||^2 + ||W_j||^2
# they are computed again from the differences, so that equal rows are at a distance of exactly 0.
_NEAR = 1e-5
_BLOCK_BYTES = 8 * 2**20
_WALK = 65536


@dataclass(frozen=True)
class Pair:
    """Unit `remove` goes, and `keep` gets `scale` times its outgoing weights."""

    keep: int
    remove: int
    saliency: float
    scale: float = 1.0


def pair_saliency(incoming: Tensor, outgoing: Tensor, bias: Tensor | None = None) -> Tensor:
    """sqrt(||W_i - W_j||^2 + (b_i - b_j)^2) ||A_j||: what removing j and keeping i costs.

    Args:
        outgoing: (C, G), the weights that read each unit; only their norms count.

    Returns:
        float64 (C, C) as [keep, remove], >= 0; inf on the diagonal. Off it 0 exactly where the rows with their biases
        are equal or nothing reads `remove`. Besides it at most about 64 MB are held.
    """
    rows, norms = _rows(incoming, bias), _outgoing_norms(outgoing)
    saliency = torch.empty((len(norms), len(norms)), dtype=torch.float64)
    for block in _blocks(rows):
        distance = _distances(rows, block).sqrt_()
        first, second = _span(block[0]), _span(block[1])
        saliency[first, second] = distance * norms[second]
        saliency[second, first] = distance.T * norms[first]
    return saliency.fill_diagonal_(math.inf)


def scaled_saliency(incoming: Tensor, outgoing: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`pair_saliency` for positively homogeneous activations, under which c > 0 times a row gives c times the unit.

    ||W_j - c W_i|| ||A_j|| with c = <W_j, W_i> / ||W_i||^2 on rows with their biases, which is never more than the
    plain saliency; where no c > 0 helps it is the plain one with a scale of 1.

    Returns:
        saliency float64 (C, C) as [keep, remove], and the scales c float64 (C, C), > 0.
    """
    rows, norms = _rows(incoming, bias), _outgoing_norms(outgoing)
    saliency = torch.empty((len(norms), len(norms)), dtype=torch.float64)
    scale = torch.empty_like(saliency)
    for first, second, dots in _blocks(rows):
        plain, sines = _distances(rows, (first, second, dots)), _sines(rows, (first, second, dots))
        ways = ((first, second, plain, sines, dots), (second, first, plain.T, sines.T, dots.T))
        for keep, remove, distance, sine, products in ways:
            rest = rows.norms[remove] * sine
            better = (products > 0) & (rest < distance)
            where = (_span(keep), _span(remove))
            saliency[where] = torch.where(better, rest, distance).sqrt_() * norms[remove]
            scale[where] = torch.where(better, products / rows.norms[keep, None], 1.0)
    return saliency.fill_diagonal_(math.inf), scale


def greedy_matching(saliency: Tensor, limit: int | None = None, *, scale: Tensor | None = None) -> list[Pair]:
    """Pairs in ascending saliency in which every unit occurs at most once; ties in the order of [keep, remove].

    Args:
        saliency: (C, C) as [keep, remove]; entries that are not finite are never chosen.
        limit: at most so many pairs; None for all, which are C // 2 when every pair is allowed.
    """
    channels = saliency.shape[0]
    most = channels // 2 if limit is None else min(limit, channels // 2)
    used = torch.zeros(channels, dtype=torch.bool)
    found: list[Pair] = []
    for keep, remove in _free_pairs(saliency, used):
        if len(found) >= most:
            break
        if used[keep] or used[remove]:
            continue
        used[keep] = used[remove] = True
        factor = 1.0 if scale is None else float(scale[keep, remove])
        found.append(Pair(keep, remove, float(saliency[keep, remove]), factor))
    return found


def _free_pairs(saliency: Tensor, used: Tensor) -> Iterator[tuple[int, int]]:
    channels = saliency.shape[0]
    flat = saliency.reshape(-1)
    for part in torch.argsort(flat, stable=True).split(_WALK):
        keep, remove = part // max(1, channels), part % max(1, channels)
        free = ~used[keep] & ~used[remove] & (keep != remove) & torch.isfinite(flat[part])
        yield from zip(keep[free].tolist(), remove[free].tolist(), strict=True)


@dataclass(frozen=True)
class _Rows:
    """The incoming weights (C, F), their biases (C,) and squared norms with bias (C,), both float64."""

    weights: Tensor
    bias: Tensor
    norms: Tensor

    def unit(self, channels: Tensor, *, normalized: bool) -> tuple[Tensor, Tensor]:
        """Float64 rows (n, F) and biases (n, 1) of some units; with `normalized` of length 1 together, or 0."""
        rows, bias = self.weights[channels].double(), self.bias[channels, None]
        if not normalized:
            return rows, bias
        length = self.norms[channels, None].sqrt()
        factor = torch.where(length > 0, 1 / length, 0.0)
        return rows * factor, bias * factor


def _rows(incoming: Tensor, bias: Tensor | None) -> _Rows:
    weights = incoming.detach()
    shift = torch.zeros(len(weights), dtype=torch.float64) if bias is None else bias.detach().double()
    norms = torch.linalg.vector_norm(weights, dim=1, dtype=torch.float64).square() + shift.square()
    _refuse_infinite(norms, "incoming")
    return _Rows(weights, shift, norms)


def _blocks(rows: _Rows) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    channels, width = rows.weights.shape
    parts = torch.arange(channels).split(max(1, _BLOCK_BYTES // (8 * max(1, width, channels))))
    for number, first in enumerate(parts):
        weights, bias = rows.unit(first, normalized=False)
        for second in parts[number:]:
            others, shift = rows.unit(second, normalized=False)
            yield first, second, (weights @ others.T).addmm_(bias, shift.T)


def _direct(
    rows: _Rows, squares: Tensor, near: Tensor, pair: tuple[Tensor, Tensor], *, normalized: bool
) -> Tensor:
    """A block (i, j) of squared distances; those that are `near` 0 are computed again from differences."""
    first, second = pair
    if int(near.sum()) > near.numel() // 16:
        weights, bias = rows.unit(first, normalized=normalized)
        others, shift = rows.unit(second, normalized=normalized)
        exact = torch.cdist(weights, others, compute_mode="donot_use_mm_for_euclid_dist").square_()
        return torch.where(near, exact.add_((bias - shift.T).square_()), squares)
    for part in near.nonzero().split(max(1, _BLOCK_BYTES // (8 * max(1, rows.weights.shape[1])))):
        weights, bias = rows.unit(first[part[:, 0]], normalized=normalized)
        others, shift = rows.unit(second[part[:, 1]], normalized=normalized)
        difference = weights.sub_(others).square_().sum(1) + (bias - shift).square_()[:, 0]
        squares[part[:, 0], part[:, 1]] = difference
    return squares


def _distances(rows: _Rows, block: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    first, second, dots = block
    size = rows.norms[first, None] + rows.norms[second]
    squares = size - 2 * dots
    return _direct(rows, squares, squares <= _NEAR * size, (first, second), normalized=False)


def _sines(rows: _Rows, block: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Squared sines of the angles between the rows of a block; 1 where they form no acute angle.

    For rows of length 1 at a distance d, sin^2 = d^2 (1 - d^2 / 4), which keeps its digits at small angles.
    """
    first, second, dots = block
    size = rows.norms[first, None] * rows.norms[second]
    cosine = torch.where(dots > 0, dots / size.sqrt(), 0.0)
    squares = 2 - 2 * cosine
    squares = _direct(rows, squares, squares <= _NEAR, (first, second), normalized=True)
    return (squares * (1 - squares / 4)).clamp_(0, 1)


def _outgoing_norms(outgoing: Tensor) -> Tensor:
    norms = torch.linalg.vector_norm(outgoing.detach(), dim=1, dtype=torch.float64)
    _refuse_infinite(norms, "outgoing")
    return norms


def _refuse_infinite(norms: Tensor, which: str) -> None:
    bad = (~torch.isfinite(norms)).nonzero().flatten().tolist()
    if bad:
        raise ModelError(
            f"the {which} weights of unit {bad[0]} are not finite", "look at the weights of the network"
        )


def _span(units: Tensor) -> slice:
    return slice(int(units[0]), int(units[-1]) + 1)
