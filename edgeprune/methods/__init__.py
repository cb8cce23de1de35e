"""How to choose what goes: the contract of a pruning method; one file per method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from edgeprune.errors import EdgepruneError, UsageError
from edgeprune.nn.allocate import Rules, allocate, keep_largest
from edgeprune.nn.costs import CostModel
from edgeprune.records import Group, Masks


@dataclass(frozen=True)
class PruneTask:
    """All that a method may know.

    groups: what can go. costs, rules: what it saves, and what must hold in the end.
    logits: (network, pixels (N, C, H, W) in [0, 1]) -> logits (N, K); the normalization is inside.
    images: float32 (N, C, H, W) in [0, 1] and labels: int64 (N,), or None when there is no data.
    """

    groups: tuple[Group, ...]
    costs: CostModel
    rules: Rules
    logits: Callable[[nn.Module, Tensor], Tensor]
    images: Tensor | None = None
    labels: Tensor | None = None
    seed: int = 0


class Method(ABC):
    """A way to choose. Members are frozen dataclasses whose fields are their options."""

    @final
    def __call__(self, network: nn.Module, task: PruneTask) -> Masks:
        """Choose, and distrust the choice: known groups, right lengths, something kept, the budget met.

        Args:
            network: the bare network; a method may train it in place but not change its structure.

        Raises:
            InfeasibleBudget: no choice meets the budget.
            EdgepruneError: the method broke its contract (a bug in it).
        """
        shapes = {k: v.shape for k, v in network.state_dict().items()}
        masks = self.prune(network, task)
        if {k: v.shape for k, v in network.state_dict().items()} != shapes:
            raise EdgepruneError(f"{type(self).__name__} changed the structure of the network")
        _check(type(self).__name__, masks, task)
        return masks

    @abstractmethod
    def prune(self, network: nn.Module, task: PruneTask) -> Masks:
        """Choose what stays."""


class ScoreMethod(Method):
    """A method that gives every channel a score and leaves the counts to the allocation."""

    @final
    def prune(self, network: nn.Module, task: PruneTask) -> Masks:
        """Score, share out the budget, keep the best of every group."""
        return choose_by(self.scores(network, task), task)

    @abstractmethod
    def scores(self, network: nn.Module, task: PruneTask) -> dict[str, Tensor]:
        """Group -> float64 (C,), >= 0; larger means keep; comparable between groups."""


def choose_by(scores: Mapping[str, Tensor], task: PruneTask) -> Masks:
    """Share out the budget and keep the largest scores of every group.

    Raises:
        InfeasibleBudget: no choice meets the budget.
        EdgepruneError: a score is not finite (the method's bug, or a network that computes NaN).
    """
    bad = [g for g, s in scores.items() if not bool(torch.isfinite(s).all())]
    if bad:
        raise EdgepruneError(
            f"the scores of {bad[0]} are not finite numbers", "does the network compute NaN on this data?"
        )
    allocation = allocate(scores, task.costs, task.rules)
    return Masks(channels={g: keep_largest(s, allocation.kept[g]) for g, s in scores.items()})


def need_images(name: str, task: PruneTask) -> tuple[Tensor, Tensor]:
    """The calibration images and labels.

    Raises:
        UsageError: there is no training data to look at.
    """
    if task.images is None or task.labels is None:
        raise UsageError(
            f"method {name} looks at training images, and there are none",
            "give --data with a training part, or choose --method magnitude",
        )
    return task.images, task.labels


def _check(name: str, masks: Masks, task: PruneTask) -> None:
    groups = {g.name: g for g in task.groups}
    for group, keep in masks.channels.items():
        if group not in groups:
            raise EdgepruneError(f"{name} chose in a group {group!r} that does not exist")
        if keep.dtype != torch.bool or keep.shape != (groups[group].channels,):
            raise EdgepruneError(f"{name}: the mask of {group} must be bool ({groups[group].channels},)")
        if not bool(keep.any()):
            raise EdgepruneError(f"{name} kept no channel of {group}")
    cost = task.costs.cost({g: int(keep.sum()) for g, keep in masks.channels.items()})
    for metric, limit in task.rules.limits.items():
        if cost[metric] > limit:
            raise EdgepruneError(
                f"{name} left {metric} at {cost[metric]:.0f}, more than the budget of {limit:.0f}"
            )
