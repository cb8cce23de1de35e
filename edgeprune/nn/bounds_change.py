"""A tensor that changes between two runs: its bounds before, after, and of the difference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgeprune.nn.bounds_interval import Interval, NoRule, Value, constant, rounded, zero


@dataclass(frozen=True)
class Change:
    """A tensor that changes. before, after: bounds of its two values, None when unknown. by: of their difference."""

    before: Value | None
    by: Value
    after: Value | None = None

    def old(self) -> Value:
        """Bounds before the change.

        Raises:
            NoRule: they are unknown.
        """
        if self.before is None:
            raise NoRule("the bound of a change needs one of the values, and they have none")
        return self.before

    def new(self) -> Value:
        """Bounds after the change: what they were plus the change, and what is known of them otherwise.

        Raises:
            NoRule: they are unknown.
        """
        if self.before is None and self.after is not None:
            return self.after
        moved_to = Value(self.old().bounds + self.by.bounds, self.by.shape)
        return (
            moved_to if self.after is None else Value(moved_to.bounds.meet(self.after.bounds), self.by.shape)
        )


@dataclass(frozen=True)
class Fixed:
    """A tensor that does not depend on the input: the dense network's and the changed one's."""

    before: Tensor
    after: Tensor

    @property
    def same(self) -> bool:
        """Whether both networks have the same."""
        return self.before is self.after or torch.equal(self.before, self.after)


def replaced(args: Any, fn: Callable[[Any], Any]) -> Any:
    """Arguments with something else in the place of each tensor."""
    if isinstance(args, (tuple, list)):
        return tuple(replaced(a, fn) for a in args)
    return fn(args) if isinstance(args, (Change, Fixed)) else args


def old_of(tensor: Change | Fixed) -> Value | Tensor:
    """What it was."""
    return tensor.old() if isinstance(tensor, Change) else tensor.before


def new_of(tensor: Change | Fixed) -> Value | Tensor:
    """What it becomes."""
    return tensor.new() if isinstance(tensor, Change) else tensor.after


def change_of(tensor: Change | Fixed) -> Value:
    """The change itself."""
    if isinstance(tensor, Change):
        return tensor.by
    if tensor.same:
        return zero(tensor.before.shape, tensor.before)
    difference = constant(tensor.after - tensor.before)
    return Value(rounded(difference.bounds.lo, difference.bounds.hi), difference.shape)


def still_of(args: Sequence[Any]) -> Tensor:
    """(B,): whether nothing has changed for a candidate."""
    tensors: list[Change | Fixed] = []
    replaced(args, tensors.append)
    still = torch.tensor([all(t.same for t in tensors if isinstance(t, Fixed))])
    for tensor in tensors:
        if isinstance(tensor, Change):
            bounds = tensor.by.bounds
            still = still & ((bounds.lo == 0) & (bounds.hi == 0)).flatten(1).all(1)
    return still


def held(out: Interval, still: Tensor) -> Interval:
    """A change with 0 where a candidate (B,) stays as it is."""
    mask = still.reshape(-1, *(1,) * (out.lo.ndim - 1))
    return Interval(out.lo.masked_fill(mask, 0.0), out.hi.masked_fill(mask, 0.0))
