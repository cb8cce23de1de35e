"""evaluate: the held-out images of a limit, and the clean accuracy of a network in torch on them."""

from __future__ import annotations

import torch

from edgeprune import intervals
from edgeprune.errors import UsageError
from edgeprune.nn import train
from edgeprune.nn.bundle import deployed
from edgeprune.nn.data import Split
from edgeprune.records import Bundle, Reading


def balanced(split: Split, limit: int, seed: int) -> Split:
    """At most `limit` images, the same share of each class, the same ones for the same seed.

    Raises:
        UsageError: the limit is not at least 1.
    """
    if limit < 1:
        raise UsageError(f"--limit {limit} must be at least 1")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(split), generator=generator)
    turn = torch.empty_like(order)
    for label in split.labels.unique():
        mine = split.labels[order] == label
        turn[mine] = torch.arange(int(mine.sum()))
    chosen = order[torch.argsort(turn, stable=True)[:limit]].sort().values
    return Split(split.name, split.labels[chosen], Chosen(split, chosen))


class Chosen:
    """The pixels of some images of a part."""

    def __init__(self, split: Split, indices: torch.Tensor) -> None:
        """Image k is image `indices[k]` of the part."""
        self._split, self._indices = split, indices

    def take(self, indices: torch.Tensor) -> torch.Tensor:
        """uint8 (n, C, H, W)."""
        return self._split.pixels.take(self._indices[indices])

    def count(self) -> int:
        """How many images there are."""
        return len(self._indices)


def of_network(bundle: Bundle, split: Split, name: str) -> Reading:
    """The accuracy of a network in torch, with its exact binomial 95 % interval."""
    right, total = train.accuracy(deployed(bundle), split)
    interval = intervals.binomial(right, total)
    where = f"local torch {torch.__version__}"
    return Reading(
        "clean_accuracy", right / total, "fraction", total, interval, where, name, {"part": split.name}
    )
