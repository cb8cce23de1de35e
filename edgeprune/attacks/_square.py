"""Square: random search with square patches, which needs logits and no gradients.

M. Andriushchenko, F. Croce, N. Flammarion and M. Hein, Square Attack: a query-efficient black-box adversarial attack
via random search, ECCV 2020, algorithms 1 to 3, with the margin as the loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from edgeprune.models import Advance, AttackResult, Logits, full, wrong
from edgeprune.train import Ball

# Section 4.1: the share of pixels is halved after each of these queries, of 10,000.
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
SCHEDULED = 10_000
# In L2 a patch has two halves of opposite sign; a side of 3 is the smallest that has both.
LEAST_SIDE = {"Linf": 1, "L2": 3}
TILES = 5
TINY = 1e-12


@dataclass(frozen=True)
class _Remaining:
    """The images that are not broken, (n, ...); best: the perturbed ones with the smallest margins so far."""

    row: Tensor
    x: Tensor
    best: Tensor
    y: Tensor
    margin: Tensor

    def only(self, rows: Tensor) -> _Remaining:
        return _Remaining(*(getattr(self, field.name)[rows] for field in fields(self)))


Box = tuple[slice, slice]


def margins(answer: Tensor, y: Tensor) -> Tensor:
    """The right class's logit less the largest of the others, (N,); < 0 is wrong."""
    right = answer.gather(1, y.unsqueeze(1)).squeeze(1)
    return right - answer.scatter(1, y.unsqueeze(1), -torch.inf).amax(1)


def share_of_pixels(query: int, queries: int, first: float, rescale: bool) -> float:
    """How large the patch of a query is, as a share of the image.

    rescale: compress the schedule, made for 10,000 queries, to `queries`; the standard evaluation does not, and with
    its 5,000 queries stops at a 128th.
    """
    at = query / queries * SCHEDULED if rescale else query
    return first / 2 ** sum(int(at) > halving for halving in HALVINGS)


def search(  # noqa: PLR0913
    logits: Logits,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    *,
    queries: int,
    first: float,
    rescale: bool,
    generator: torch.Generator,
    advance: Advance,
    faster: Logits | None = None,
) -> AttackResult:
    """Search until an image is misclassified, with at most `queries` >= 1 of each, the first stripes or tiles.

    All images of a call get their patches at the same places. faster: nearly the same logits in less time; what is
    misclassified by them is checked with `logits`.
    """
    found = x.clone()
    broken = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    asked = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    start = _stripes(x, ball, generator) if ball.norm == "Linf" else _tiles(x, ball, generator)
    remaining = _Remaining(
        torch.arange(len(x), device=x.device), x, start, y, torch.full((len(x),), torch.inf).to(x)
    )
    moves = _squares if ball.norm == "Linf" else _pyramids
    for query in range(queries):
        tried = remaining.best
        if query:
            side = _side(x, share_of_pixels(query - 1, queries, first, rescale), ball.norm)
            tried = moves(remaining, ball, side, generator)
        output = _logits(logits, faster, tried, remaining.y)
        out, margin = wrong(output, remaining.y), margins(output, remaining.y)
        asked[remaining.row] += 1
        better = out | (margin < remaining.margin)
        remaining.best[better], remaining.margin[better] = tried[better], margin[better]
        if out.any():
            found[remaining.row[out]], broken[remaining.row[out]] = remaining.best[out], True
            advance(int(out.sum()))
            remaining = remaining.only(~out)
            if not len(remaining.row):
                break
    found[remaining.row] = remaining.best
    advance(len(remaining.row))
    return AttackResult(found, broken, asked)


def _logits(logits: Logits, faster: Logits | None, tried: Tensor, y: Tensor) -> Tensor:
    """The logits (N, K); of images that are wrong by the faster ones, those of the network itself."""
    with torch.no_grad():
        if faster is None:
            return logits(tried)
        found = full(faster(tried))
        rows = wrong(found, y)
        if rows.any():
            found = found.clone()
            found[rows] = logits(tried[rows])
    return found


def _side(x: Tensor, share: float, norm: str) -> int:
    """Of the square patch, in pixels; odd in L2."""
    height, width = x.shape[-2:]
    side = max(round(math.sqrt(share * height * width)), LEAST_SIDE[norm])
    if norm == "L2" and side % 2 == 0:
        side += 1
    return min(side, height, width)


def _stripes(x: Tensor, ball: Ball, generator: torch.Generator) -> Tensor:
    count, channels, _, width = x.shape
    return (x + ball.eps * _signs((count, channels, 1, width), generator).to(x)).clamp(0, 1)


def _squares(remaining: _Remaining, ball: Ball, side: int, generator: torch.Generator) -> Tensor:
    """Algorithm 2: one square moves by +-2 eps in each channel, which takes it to the ball's surface."""
    rows, columns = _box(remaining.x, side, generator)
    moves = 2 * ball.eps * _signs((len(remaining.x), remaining.x.shape[1], 1, 1), generator).to(remaining.x)
    tried = remaining.best.clone()
    window, x = remaining.best[:, :, rows, columns], remaining.x[:, :, rows, columns]
    tried[:, :, rows, columns] = torch.clamp(window + moves, x - ball.eps, x + ball.eps).clamp(0, 1)
    return tried


def _tiles(x: Tensor, ball: Ball, generator: torch.Generator) -> Tensor:
    """Five by five pyramids, together `eps` long (section 3.2)."""
    count, channels, height, width = x.shape
    side = max(min(height, width) // TILES, 1)
    change = torch.zeros_like(x)
    for top in _begins(height, side):
        for left in _begins(width, side):
            signs = _signs((count, channels, 1, 1), generator)
            pyramid = _pyramid(side, generator) * signs
            change[:, :, top : top + side, left : left + side] = pyramid.to(x)
    return (x + ball.eps * _unit(change)).clamp(0, 1)


def _begins(extent: int, side: int) -> Iterator[int]:
    return iter(range(max((extent - TILES * side) // 2, 0), extent - side + 1, side))


def _pyramids(remaining: _Remaining, ball: Ball, side: int, generator: torch.Generator) -> Tensor:
    """Algorithm 3: what is in two windows, and what the ball has left, is put into a pyramid in the first."""
    first, second = _box(remaining.x, side, generator), _box(remaining.x, side, generator)
    count, channels = remaining.x.shape[:2]
    change = remaining.best - remaining.x
    energy = change.square()
    inside = _energy(energy, first) + _energy(energy, second) - _energy(energy, _overlap(first, second))
    left = (ball.eps**2 - energy.sum((1, 2, 3), keepdim=True)).clamp_min(0) / channels
    pyramid = (_pyramid(side, generator) * _signs((count, channels, 1, 1), generator)).to(change)
    window = change[:, :, first[0], first[1]]
    mixed = pyramid + window / (TINY + _energy(energy, first).sqrt())
    mixed = mixed / (TINY + mixed.square().sum((2, 3), keepdim=True).sqrt())
    change[:, :, second[0], second[1]] = 0
    change[:, :, first[0], first[1]] = mixed * (left + inside.clamp_min(0)).sqrt()
    return (remaining.x + ball.eps * _unit(change)).clamp(0, 1)


def _pyramid(side: int, generator: torch.Generator) -> Tensor:
    """(side, side) of length 1: a positive and a negative half, one above or beside the other (eq. 2)."""
    half = side // 2
    whole = torch.cat([_half(half, side), -_half(side - half, side)])
    whole = whole / whole.norm()
    return whole.T if torch.rand(1, generator=generator) > 0.5 else whole


def _half(height: int, width: int) -> Tensor:
    """Rectangles within each other around the middle; the k-th adds 1 / k^2. (height, width), of length 1."""
    count = max(height, width) // 2 + 1
    steps = (1 / torch.arange(1, count + 1).square()).flip(0).cumsum(0).flip(0)
    up = (torch.arange(height) - height // 2).abs()
    across = (torch.arange(width) - width // 2).abs()
    heights = steps[torch.maximum(up.unsqueeze(1), across)]
    return heights / heights.norm().clamp_min(TINY)


def _box(x: Tensor, side: int, generator: torch.Generator) -> Box:
    height, width = x.shape[-2:]
    top = int(torch.randint(height - side + 1, (1,), generator=generator))
    left = int(torch.randint(width - side + 1, (1,), generator=generator))
    return slice(top, top + side), slice(left, left + side)


def _overlap(one: Box, other: Box) -> Box:
    begins = [max(a.start, b.start) for a, b in zip(one, other, strict=True)]
    ends = [min(a.stop, b.stop) for a, b in zip(one, other, strict=True)]
    rows, columns = (slice(begin, max(begin, end)) for begin, end in zip(begins, ends, strict=True))
    return rows, columns


def _energy(energy: Tensor, box: Box) -> Tensor:
    """In the box, of each image and channel: (N, C, 1, 1)."""
    return energy[:, :, box[0], box[1]].sum((2, 3), keepdim=True)


def _unit(change: Tensor) -> Tensor:
    return change / (TINY + change.square().sum((1, 2, 3), keepdim=True).sqrt())


def _signs(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return 2.0 * torch.randint(2, shape, generator=generator) - 1.0
