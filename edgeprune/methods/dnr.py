"""Train sparse and rewire every epoch: weakest units go, those with most momentum come; robust with an attack.

Kundu, Nazemi, Beerel and Pedram, "DNR: A Tunable Robust Pruning Framework Through Dynamic Network Rewiring of DNNs"
(ASP-DAC 2021): one training within the budget, on a hybrid loss of clean and adversarial images plus a dynamic L2
term. Gradients stay dense, so that pruned weights have a momentum to rank them by. Unlike the authors' public code
the budget holds exactly after every epoch, the L2 term has a gradient (its anchor is detached), a weight that is
removed and regrown at once starts at zero too, and the cost of a channel is its cost in the network that is cut.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from edgeprune import train
from edgeprune.errors import UsageError
from edgeprune.methods._base import PruneTask, Training, TrainingMethod, need_training, reinitialize
from edgeprune.methods._dnr.rewiring import ChannelBudget, largest_remainder
from edgeprune.methods._dnr.sparse_training import REGULARIZERS, Plan, SparseTraining
from edgeprune.quantities import check_choice
from edgeprune.records import Masks
from edgeprune.structure import allocate, fitting_levels, keep_largest
from edgeprune.train import TrainingJob, fit, seeded_generator

STARTS = ("given", "scratch")
INITS = ("auto", "global", "uniform", "random")
# Least weights of a layer per output; fewer where the budget leaves no choice.
FLOOR_PER_OUTPUT = 1 / 8
HYBRID = 0.5
# A ResNet-20 with a tenth of its trained weights, after four epochs on 1,440 images, had an accuracy of 59 % with 0.2,
# 46 % with 0.5, and 51 % without rewiring.
GIVEN_RATE = 0.2
SCRATCH_RATE = 0.5


@dataclass(frozen=True)
class DNR(TrainingMethod):
    """Dynamic network rewiring.

    start: given weights or scratch. init: the first masks: the largest weights of all layers (global), the same share
    of each layer by magnitude (uniform) or at random (random); auto is global, and from scratch random. rate: share of
    active units traded after the first epoch, falling to 0 at the share `until` of the epochs; -1 is 0.2, from scratch
    0.5 as in the paper. beta: share of the clean images in the loss; -1 is tune.beta, or 0.5 where that is 0.
    regularizer: proximal (towards the weights at the epoch's start), admm (towards what the next rewiring would leave)
    or none; rho: its weight. revive_value: a unit that is removed and regrown at once keeps its value, as in the
    authors' code.
    """

    start: str = "given"
    init: str = "auto"
    rate: float = -1.0
    until: float = 1.0
    beta: float = -1.0
    regularizer: str = "proximal"
    rho: float = 1e-4
    revive_value: bool = False

    def prune(self, network: nn.Module, task: PruneTask) -> Masks:
        """Train within the budget for all epochs, in place."""
        self._check()
        training = need_training("dnr", task)
        if training.table.epochs < 1:
            raise UsageError("dnr trains while it prunes, and tune.epochs is 0", "give --epochs, 10 or more")
        if task.free:
            raise UsageError(
                "dnr trains on a budget from the first step on, and there is none",
                'give one, as in --budget "params=10 %"',
            )
        objective = self._objective(training)
        if self.start == "scratch":
            task.notes.extend(reinitialize(network, training.seed))
        wiring = self.sparse_training(network, task, training)
        job = TrainingJob(
            training.split,
            training.table,
            training.seed,
            training.scratch,
            training.teacher,
            training.validation,
        )
        history = fit(training.deployed(network), job, wiring.hooks(objective))
        task.units.apply(network, wiring.masks)
        task.record["dnr"] = {**wiring.record, "loss": list(history.losses)}
        return task.units.masks(wiring.masks)

    def sparse_training(self, network: nn.Module, task: PruneTask, training: Training) -> SparseTraining:
        """The training with sparse gradients that the options ask for."""
        epochs = training.table.epochs
        usual = SCRATCH_RATE if self.start == "scratch" else GIVEN_RATE
        plan = Plan(
            epochs,
            usual if self.rate == -1 else self.rate,
            self.until,
            self.regularizer,
            self.rho,
            self.revive_value,
        )
        masks = first_masks(self, network, task, training.seed)
        settings = f"{self!r} {sorted(task.rules.limits.items())}"
        if task.units.granularity == "channel":
            steps = fitting_levels(task.units.sizes, task.costs, task.rules)[1]
            budget = ChannelBudget(task.costs.cost, task.rules.limits, steps)
            return SparseTraining(network, task.units, plan, masks, budget=budget, settings=settings)
        floors = layer_floors(task) if task.units.granularity == "weight" else {}
        return SparseTraining(network, task.units, plan, masks, floors, settings=settings)

    def _check(self) -> None:
        check_choice("dnr: start", self.start, STARTS)
        check_choice("dnr: init", self.init, INITS)
        check_choice("dnr: regularizer", self.regularizer, REGULARIZERS)
        ranges = (
            ("rate", self.rate, 1.0),
            ("until", self.until, 1.0),
            ("beta", self.beta, 1.0),
            ("rho", self.rho, 1e6),
        )
        for name, value, high in ranges:
            chosen_here = name in ("rate", "beta") and value == -1
            if not 0 <= value <= high and not chosen_here:
                raise UsageError(
                    f"dnr: {name} = {value} must be between 0 and {high:g}",
                    "leave it out for the usual value",
                )

    def _objective(self, training: Training) -> train.Objective:
        table = training.table
        objective = train.objective_of(table, training.teacher if table.distill > 0 else None)
        if objective.kind in ("fgsm", "pgd"):
            return replace(objective, beta=self.beta if self.beta >= 0 else table.beta or HYBRID)
        if self.beta not in (-1, 1) or (self.beta == 1 and objective.kind == "trades"):
            raise UsageError(
                f"dnr: beta = {self.beta:g} shares the loss between clean and adversarial images, which the objective "
                f"{objective.kind} does not",
                "choose --objective pgd or fgsm, or leave beta out",
            )
        return objective


def first_masks(rules: DNR, network: nn.Module, task: PruneTask, seed: int) -> dict[str, Tensor]:
    """The masks before the first step, exactly within the budget."""
    init = rules.init
    if init == "auto":
        init = "random" if rules.start == "scratch" else "global"
    units = task.units
    scores = units.norms(network)
    if init == "random":
        generator = seeded_generator(seed, "first masks of dnr")
        scores = {
            n: torch.rand(size, generator=generator, dtype=torch.float64) for n, size in units.sizes.items()
        }
    if units.granularity == "2:4" or (init == "global" and units.granularity == "weight"):
        return task.keep(scores)
    if units.granularity == "weight":
        counts = _uniform(task)
        return {name: keep_largest(score, counts[name]) for name, score in scores.items()}
    # The allocation also uses half steps, rewiring only whole ones.
    if init == "global":
        kept = {n: int(m.sum()) for n, m in task.keep(scores).items()}
    else:
        losses = {name: torch.zeros(n + 1, dtype=torch.float64) for name, n in units.sizes.items()}
        kept = allocate(losses, task.costs, replace(task.rules, cuts=task.rules.cuts or {})).kept
    return {
        name: keep_largest(scores[name], max((k for k in steps if k <= kept[name]), default=steps[-1]))
        for name, steps in fitting_levels(units.sizes, task.costs, task.rules)[1].items()
    }


def _uniform(task: PruneTask) -> Mapping[str, int]:
    sizes = task.units.sizes
    if task.counts is not None:
        return task.counts
    n, floors = list(sizes.values()), layer_floors(task)
    found = largest_remainder([float(size) for size in n], task.quota(), n, [floors[name] for name in sizes])
    return dict(zip(sizes, found, strict=True))


def layer_floors(task: PruneTask) -> dict[str, int]:
    """The least of each layer: an eighth of its outputs, or the task's floors where that would be too many."""
    floors, shapes = task.floors(), task.units.shapes
    preferred = {
        n: max(least, min(task.units.sizes[n], int(FLOOR_PER_OUTPUT * shapes[n][0])))
        for n, least in floors.items()
    }
    return preferred if sum(preferred.values()) <= task.quota() else floors
