"""How to choose what goes: the contract of a pruning method; one file per method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn

from edgeprune.errors import EdgepruneError, UsageError
from edgeprune.nn.allocate import Rules, allocate, keep_largest, losses_of
from edgeprune.nn.costs import CostModel
from edgeprune.records import Group, InputSpec, Masks


@dataclass(frozen=True)
class PruneTask:
    """All that a method may know.

    groups: what can go. costs, rules: what it saves, and what must hold in the end.
    logits: (network, pixels (N, C, H, W) in [0, 1]) -> logits (N, K); the normalization is inside.
    images: float32 (N, C, H, W) in [0, 1] and labels: int64 (N,), or None when there is no data.
    spec: what the network eats; None where nothing is said of it.
    unlabelled: float32 (N, C, H, W), synthesized or calibration images that the network will be repaired on; or None.
    notes: what a reader of the results must know; a method appends to it.
    """

    groups: tuple[Group, ...]
    costs: CostModel
    rules: Rules
    logits: Callable[[nn.Module, Tensor], Tensor]
    images: Tensor | None = None
    labels: Tensor | None = None
    seed: int = 0
    spec: InputSpec | None = None
    unlabelled: Tensor | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Survey:
    """losses: group -> float64 (C + 1,), what it costs to keep so many; detail: the method's own, for `choose`."""

    losses: Mapping[str, Tensor]
    detail: Any = None


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
        verify(type(self).__name__, masks, task)
        return masks

    @abstractmethod
    def prune(self, network: nn.Module, task: PruneTask) -> Masks:
        """Choose what stays."""


class SurveyMethod(Method):
    """A method that says first what every count of every group costs, and chooses when the counts are known."""

    @final
    def prune(self, network: nn.Module, task: PruneTask) -> Masks:
        """Survey, share out the budget, choose."""
        survey = self.survey(network, task)
        return self.choose(network, task, survey, counts(survey, task))

    @abstractmethod
    def survey(self, network: nn.Module, task: PruneTask) -> Survey:
        """What it costs to keep each number of channels; the network is not changed."""

    @abstractmethod
    def choose(self, network: nn.Module, task: PruneTask, survey: Survey, kept: Mapping[str, int]) -> Masks:
        """Which channels stay, so many of every group; may edit the network's weights in place."""


class ScoreMethod(SurveyMethod):
    """A method that gives every channel a score and leaves the counts to the allocation."""

    @final
    def survey(self, network: nn.Module, task: PruneTask) -> Survey:
        """Losses of the smallest scores of each group.

        Raises:
            EdgepruneError: a score is not finite (the method's bug, or a network that computes NaN).
        """
        scores = self.scores(network, task)
        bad = [g for g, s in scores.items() if not bool(torch.isfinite(s).all())]
        if bad:
            raise EdgepruneError(
                f"the scores of {bad[0]} are not finite numbers", "does the network compute NaN on this data?"
            )
        return Survey(losses_of(scores), scores)

    @final
    def choose(self, network: nn.Module, task: PruneTask, survey: Survey, kept: Mapping[str, int]) -> Masks:
        """Keep the largest scores of every group."""
        return Masks(channels={g: keep_largest(s, kept[g]) for g, s in survey.detail.items()})

    @abstractmethod
    def scores(self, network: nn.Module, task: PruneTask) -> dict[str, Tensor]:
        """Group -> float64 (C,), >= 0; larger means keep; comparable between groups."""


def counts(survey: Survey, task: PruneTask) -> dict[str, int]:
    """How many channels each group keeps, so that the budget holds.

    Raises:
        InfeasibleBudget: no choice meets the budget.
    """
    return allocate(survey.losses, task.costs, task.rules).kept


def need_images(name: str, task: PruneTask) -> tuple[Tensor, Tensor]:
    """The calibration images and labels.

    Raises:
        UsageError: there is no training data to look at.
    """
    if task.images is None or task.labels is None:
        raise UsageError(
            f"method {name} looks at training images, and there are none",
            "give --data with a training part, or choose --method data-free",
        )
    return task.images, task.labels


def verify(name: str, masks: Masks, task: PruneTask) -> None:
    """Hold a choice against its task.

    Raises:
        EdgepruneError: the method broke its contract; says how.
    """
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
