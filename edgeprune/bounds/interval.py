"""Intervals of tensors, their arithmetic rounded outward, and hulls over positions as axes of size one.

A `Value` has the bounds of one tensor of a traced network: lo and hi of shape (B, ...), after the batch B one axis for
each axis of the tensor, of full size or of size 1. Size 1 where the tensor has more is a hull over that axis.

Every operation widens its result by more than its rounding error in the dtype of the bounds (n products and sums: n eps
of the sum of the magnitudes; Higham 2002, section 3.1), so the bounds hold for exact arithmetic, underflow aside. Zero
intervals stay zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edgeprune.errors import UnsupportedModel


class Unbounded(UnsupportedModel):
    """An operator without a sound bound."""

    def __init__(self, op: str, layer: str, reason: str) -> None:
        where = f"{op} in {layer}" if layer else op
        UnsupportedModel.__init__(self, f"{where} can't be bounded: {reason}")
        self.op = op
        self.layer = layer
        self.reason = reason


class NoRule(Exception):
    """A rule does not cover its arguments; becomes an `Unbounded` with the operator."""


@dataclass(frozen=True)
class Interval:
    """lo <= hi, two tensors of the same shape (B, ...)."""

    lo: Tensor
    hi: Tensor

    def ball(self, terms: int) -> tuple[Tensor, Tensor]:
        """Center and radius for a sum of `terms` products with weights, the radius widened for its rounding."""
        center, radius, wide = (self.lo + self.hi) / 2, (self.hi - self.lo) / 2, slack(self.lo.dtype, terms)
        return center, torch.add(radius * (1 + wide), center.abs(), alpha=wide)

    @property
    def magnitude(self) -> Tensor:
        """The largest absolute value inside."""
        return torch.maximum(self.lo.abs(), self.hi.abs())

    @property
    def finite(self) -> bool:
        """Whether both ends are finite."""
        return bool(torch.isfinite(self.lo.amin()) and torch.isfinite(self.hi.amax()))

    def hull(self, other: Interval | float) -> Interval:
        """The smallest interval that contains both; the other one may be a number."""
        if isinstance(other, Interval):
            return Interval(torch.minimum(self.lo, other.lo), torch.maximum(self.hi, other.hi))
        return Interval(self.lo.clamp(max=other), self.hi.clamp(min=other))

    def intersect(self, other: Interval) -> Interval:
        """The intersection; not empty, as both are bounds of one value."""
        return Interval(torch.maximum(self.lo, other.lo), torch.minimum(self.hi, other.hi))

    def __neg__(self) -> Interval:
        return Interval(-self.hi, -self.lo)

    def __add__(self, other: Interval) -> Interval:
        return rounded(self.lo + other.lo, self.hi + other.hi)

    def __sub__(self, other: Interval) -> Interval:
        return rounded(self.lo - other.hi, self.hi - other.lo)

    def __mul__(self, other: Interval) -> Interval:
        products = (self.lo * other.lo, self.lo * other.hi, self.hi * other.lo, self.hi * other.hi)
        lo = torch.minimum(torch.minimum(products[0], products[1]), torch.minimum(products[2], products[3]))
        hi = torch.maximum(torch.maximum(products[0], products[1]), torch.maximum(products[2], products[3]))
        return rounded(lo, hi)

    def scaled(self, factor: float | Tensor) -> Interval:
        """Times a number or a constant tensor."""
        low, high = self.lo * factor, self.hi * factor
        return rounded(torch.minimum(low, high), torch.maximum(low, high))


def point(values: Tensor) -> Interval:
    """The interval with lo = hi."""
    return Interval(values, values)


def slack(dtype: torch.dtype, terms: int) -> float:
    """Twice the relative rounding error of a sum of `terms` products in any order."""
    return float(torch.finfo(dtype).eps) * (terms + 4)


def rounded(lo: Tensor, hi: Tensor, operations: int = 1) -> Interval:
    """Widened by the rounding of a few operations, each relative to the result."""
    eps = slack(lo.dtype, operations)
    return Interval(torch.add(lo, lo.abs(), alpha=-eps), torch.add(hi, hi.abs(), alpha=eps))


def from_center(center: Tensor, radius: Tensor) -> Interval:
    """[center - radius, center + radius]; the radius already covers the rounding."""
    return Interval(center - radius, center + radius)


@dataclass(frozen=True)
class Value:
    """Bounds of one tensor. bounds: (B, ...), one axis after B for each of `shape`, the tensor's for a batch of one."""

    bounds: Interval
    shape: tuple[int, ...]

    @property
    def kept(self) -> tuple[int, ...]:
        """The size of each axis in the bounds: that of `shape`, or 1."""
        return tuple(self.bounds.lo.shape[1:])

    @property
    def rank(self) -> int:
        """Number of axes of the tensor."""
        return len(self.shape)

    def collapsed(self, axis: int) -> bool:
        """Whether the bounds are a hull over this axis."""
        return self.kept[axis] == 1 and self.shape[axis] > 1

    def full(self, axes: Sequence[int] | None = None) -> Interval:
        """The bounds with these axes (by default all) expanded to full size."""
        wanted = range(self.rank) if axes is None else [a % self.rank for a in axes]
        size = [-1] + [self.shape[a] if a in wanted else -1 for a in range(self.rank)]
        return Interval(self.bounds.lo.expand(size), self.bounds.hi.expand(size))

    def ranked(self, rank: int) -> Interval:
        """The bounds with new axes after the batch, for broadcasting against `rank` axes."""
        at = (self.bounds.lo.shape[0], *(1,) * (rank - self.rank), *self.kept)
        return Interval(self.bounds.lo.reshape(at), self.bounds.hi.reshape(at))


def constant(values: Tensor) -> Value:
    """The bounds of a constant tensor."""
    return Value(point(values.unsqueeze(0)), tuple(values.shape))


def zero(shape: Sequence[int], like: Tensor) -> Value:
    """The bounds of no change."""
    return Value(point(like.new_zeros((1, *(1 for _ in shape)))), tuple(shape))
