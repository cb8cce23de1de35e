"""The contract of a pruning method: what it is given, and what it returns; one file per method."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from edgeprune.data import Split
from edgeprune.errors import EdgepruneError, InfeasibleBudget, UsageError
from edgeprune.models import CostModel
from edgeprune.recipe import TuneTable
from edgeprune.records import Group, InputSpec, Masks
from edgeprune.structure import (
    BLOCK,
    KEPT_OF_BLOCK,
    Rules,
    Units,
    allocate,
    exactly,
    keep_largest,
    losses_of,
    of_channels,
)

# An empty layer would cut off everything downstream.
LEAST_DENSITY = 0.005
CLASSIFIER_DIMS = 2


@dataclass(frozen=True)
class Training:
    """What a method that trains is given.

    validation: images to choose by; neither in `split` nor held out. scratch: a folder for checkpoints. teacher: the
    dense model, pixels (N, C, H, W) in [0, 1] -> logits (N, K). deployed: network -> the same on pixels, with shared
    parameters.
    """

    split: Split
    validation: Split
    table: TuneTable
    scratch: Path
    seed: int
    teacher: nn.Module | None
    deployed: Callable[[nn.Module], nn.Module]


@dataclass(frozen=True)
class PruneTask:
    """The input of a pruning method.

    logits: (network, pixels (N, C, H, W) in [0, 1]) -> logits (N, K); includes the normalization.
    images: float32 (N, C, H, W) in [0, 1]. labels: int64 (N,). unlabelled: as images, for a repair without labels.
    notes: for the report; a method appends to it. weights: units finer than channels. counts: how many of them each
    parameter keeps, where the recipe fixes it. record: curves for the report.
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
    weights: Units | None = None
    counts: Mapping[str, int] | None = None
    training: Training | None = None
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def units(self) -> Units:
        """What is kept or removed as a whole."""
        return of_channels(self.groups) if self.weights is None else self.weights

    @property
    def free(self) -> bool:
        """Whether there is no limit: the method itself must decide when to stop."""
        return not self.rules.limits and self.units.granularity != "2:4"

    def quota(self) -> int:
        """How many weights stay; meaningless for channels."""
        units = self.units
        quota = total = sum(units.sizes.values())
        if units.granularity == "2:4":
            quota -= sum(b.numel() // BLOCK * KEPT_OF_BLOCK for b in units.blocks.values())
        others = self.costs.cost({})["params"] - total
        limit = self.rules.limits.get("params", math.inf)
        if units.granularity == "weight" and math.isfinite(limit):
            quota = min(total, math.floor(limit + 1e-9) - round(others))
        least = sum(self.floors().values()) if units.granularity == "weight" else quota
        if quota < least or quota + others > limit:
            raise InfeasibleBudget(
                f"the budget can't be met by zeroing weights: params at most {limit:,.0f} asked for, "
                f"at least {least + others:,.0f} stay",
                "raise the budget, or prune channels (--granularity channel)",
            )
        return quota

    def floors(self) -> dict[str, int]:
        """The least number of weights of each parameter: 0.5 %, and as many as the classifier has outputs."""
        sizes, shapes = self.units.sizes, self.units.shapes
        floors = {name: max(1, math.ceil(LEAST_DENSITY * n)) for name, n in sizes.items()}
        classifier = next(
            (name for name in reversed(tuple(shapes)) if len(shapes[name]) == CLASSIFIER_DIMS), None
        )
        if classifier is not None:
            floors[classifier] = min(sizes[classifier], max(floors[classifier], shapes[classifier][0]))
        return floors

    def keep(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The largest scores within the budget; everything without one.

        Args:
            scores: name -> float (n,), >= 0; scores of channels must be comparable between groups.
        """
        units = self.units
        if self.free:
            return units.all()
        if units.granularity == "channel":
            kept = counts(Survey(losses_of({g: torch.clamp(s, min=0) for g, s in scores.items()})), self)
            return {g: keep_largest(s, kept[g]) for g, s in scores.items()}
        quota = self.quota()
        if units.granularity == "2:4":
            return units.best_of_blocks(scores)
        if self.counts is not None:
            return {name: keep_largest(s, self.counts[name]) for name, s in scores.items()}
        return exactly(scores, quota, self.floors())


@dataclass(frozen=True)
class Survey:
    """The cost of keeping each number of channels.

    losses: group -> float64 (C + 1,), with the other groups unpruned. detail: for `choose`.
    together: counts of all groups -> their joint loss, where it can be measured, at most `tries` times.
    """

    losses: Mapping[str, Tensor]
    detail: Any = None
    together: Callable[[Mapping[str, int]], float] | None = None
    tries: int = 0


class Method(ABC):
    """A pruning method; subclasses are frozen dataclasses whose fields are the options."""

    @final
    def __call__(self, network: nn.Module, task: PruneTask) -> Masks:
        shapes = {k: v.shape for k, v in network.state_dict().items()}
        masks = self.prune(network, task)
        if {k: v.shape for k, v in network.state_dict().items()} != shapes:
            raise EdgepruneError(f"{type(self).__name__} changed the structure of the network")
        verify(type(self).__name__, masks, task)
        return masks

    @abstractmethod
    def prune(self, network: nn.Module, task: PruneTask) -> Masks:
        """Choose what stays."""


class TrainingMethod(Method):
    """A method that trains the network while it prunes, for all epochs of the recipe."""


class SurveyMethod(Method):
    """A method that measures the loss of each count first, and chooses channels when the counts are allocated.

    Units finer than channels need no survey: the largest scores stay.
    """

    @final
    def prune(self, network: nn.Module, task: PruneTask) -> Masks:
        """Survey, allocate the budget, choose."""
        if task.weights is not None:
            return task.units.masks(task.keep(_finite(self.scores(network, task))))
        survey = self.survey(network, task)
        return self.choose(network, task, survey, counts(survey, task))

    @abstractmethod
    def survey(self, network: nn.Module, task: PruneTask) -> Survey:
        """The loss of each number of channels; the network is not changed."""

    @abstractmethod
    def choose(self, network: nn.Module, task: PruneTask, survey: Survey, kept: Mapping[str, int]) -> Masks:
        """Which channels stay, as many as `kept`; may edit the network's weights in place."""

    @abstractmethod
    def scores(self, network: nn.Module, task: PruneTask) -> dict[str, Tensor]:
        """Name of `task.units` -> float64 (n,), >= 0; larger means keep; comparable between names."""


class ScoreMethod(SurveyMethod):
    """A method that gives each unit a score and leaves the counts to the allocation."""

    @final
    def survey(self, network: nn.Module, task: PruneTask) -> Survey:
        """Losses from the smallest scores of each group."""
        scores = _finite(self.scores(network, task))
        return self.weigh(network, task, scores)

    def weigh(self, network: nn.Module, task: PruneTask, scores: Mapping[str, Tensor]) -> Survey:
        """The loss of keeping only the largest scores, by the scores alone; `detail` are the scores."""
        del network, task
        return Survey(losses_of(scores), scores)

    @final
    def choose(self, network: nn.Module, task: PruneTask, survey: Survey, kept: Mapping[str, int]) -> Masks:
        """Keep the largest scores of every group."""
        return Masks(channels={g: keep_largest(s, kept[g]) for g, s in survey.detail.items()})


def _finite(scores: dict[str, Tensor]) -> dict[str, Tensor]:
    bad = [name for name, s in scores.items() if not bool(torch.isfinite(s).all())]
    if bad:
        raise EdgepruneError(
            f"the scores of {bad[0]} are not finite numbers", "does the network compute NaN on this data?"
        )
    return scores


def group_shares(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values of the units as shares of their group's sum: independent of its width and scale."""
    return {name: v / torch.clamp(v.sum(), min=1e-30) for name, v in values.items()}


def counts(survey: Survey, task: PruneTask) -> dict[str, int]:
    """How many channels each group keeps within the budget."""
    return allocate(survey.losses, task.costs, task.rules).kept


def need_images(name: str, task: PruneTask) -> tuple[Tensor, Tensor]:
    """The calibration images and labels; refuses a task without."""
    if task.images is None or task.labels is None:
        raise UsageError(
            f"method {name} needs training images, and there are none",
            "give --data with a training part, or choose --method data-free",
        )
    return task.images, task.labels


def need_training(name: str, task: PruneTask) -> Training:
    """The training data of the task; refuses a task without."""
    if task.training is None:
        raise UsageError(
            f"method {name} trains the network, and there are no training images or no epochs",
            "give --data with a training part (without --data-use evaluate) and --epochs, or choose --method data-free",
        )
    return task.training


def reinitialize(network: nn.Module, seed: int) -> tuple[str, ...]:
    """Draw new weights by the seed, on the CPU; a note names those that no layer can initialize."""
    fresh, drawn = deepcopy(network).cpu(), set[str]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for path, layer in fresh.named_modules():
            reset = getattr(layer, "reset_parameters", None)
            if callable(reset):
                reset()
                own = layer.named_parameters(path, recurse=False)
                drawn |= {name for name, _ in own}
    if not drawn:
        raise UsageError("no layer of the network can be initialized anew", "train from the given weights")
    network.load_state_dict(fresh.state_dict())
    old = [name for name, _ in network.named_parameters() if name not in drawn]
    return (
        (f"These keep the given values, because no layer can initialize them: {', '.join(old)}.",)
        if old
        else ()
    )


def verify(name: str, masks: Masks, task: PruneTask) -> None:
    """Refuse unknown groups, masks of the wrong shape, empty groups and a broken budget."""
    if task.weights is not None:
        _verify_weights(name, masks, task)
        return
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


def _verify_weights(name: str, masks: Masks, task: PruneTask) -> None:
    units = task.units
    for parameter, keep in masks.weights.items():
        if parameter not in units.shapes:
            raise EdgepruneError(f"{name} chose in {parameter!r}, whose weights can't be pruned")
        if keep.dtype != torch.bool or tuple(keep.shape) != units.shapes[parameter]:
            raise EdgepruneError(f"{name}: the mask of {parameter} must be bool {units.shapes[parameter]}")
        if units.granularity == "2:4":
            kept = keep.flatten()[units.blocks[parameter]].sum(1)
            if bool((kept != KEPT_OF_BLOCK).any()):
                raise EdgepruneError(
                    f"{name}: a block of {parameter} does not keep {KEPT_OF_BLOCK} of {BLOCK}"
                )
    stay = sum(int(masks.weights[n].sum()) if n in masks.weights else size for n, size in units.sizes.items())
    if not task.free and stay != task.quota():
        raise EdgepruneError(f"{name} kept {stay} weights, the budget says {task.quota()}")
