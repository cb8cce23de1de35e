"""Cut repeatedly as much as the PQ index of the weights calls superfluous, and train in between.

Diao, Wang, Zhang, Yang, Ding and Tarokh, "Pruning Deep Neural Networks from a Sparsity Perspective" (ICLR 2023),
Algorithm 1, at every granularity: for channels the index of their norms, for 2:4 the number of blocks that take the
pattern. Unlike the paper, SAP here can meet a budget: the last cut leaves exactly what that allows. And it can continue
from the current weights (`variant` tune), when it stops by the index itself: this falls while training makes the
weights more even, rises when only what matters is left, and falls again when the network collapses.
"""

import math
import shutil
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgeprune import distributed, models, train
from edgeprune.errors import UsageError
from edgeprune.methods._base import PruneTask, TrainingMethod, need_training, reinitialize
from edgeprune.methods._sap import schedule
from edgeprune.methods._sap.schedule import CutSchedule, Rule
from edgeprune.quantities import check_choice
from edgeprune.records import Masks
from edgeprune.structure import pqi
from edgeprune.train import masking_hooks, objective_of

VARIANTS = ("tune", "paper", "oneshot")
STARTS = ("given", "scratch")
# Of trainings that begin anew, and where no budget says how many cuts it needs.
EPOCHS_EACH = 5
# Epochs after the last cut of a network that goes on from its weights; from 2 to 12 epochs, half of them were worse.
LAST_SHARE = 2 / 3
VALIDATED = 1000
CURVES = ("iterations", "accuracy", "mean", "counts")


@dataclass(frozen=True)
class Sap(TrainingMethod):
    """p, q: orders of the PQ index. eta, gamma, beta: slack, factor and largest share of its count.

    scope: what is counted together: the rows of a weight ("unit"), a "layer", or the whole network ("global").
    variant: "tune" continues from the current weights, "paper" rewinds to the first ones before each training,
    "oneshot" does not train. start: "given" weights, or "scratch". iterations: number of cuts; 0 is as many as the
    budget needs and the epochs allow. ratio: a fixed share per cut (a lottery ticket); 0 uses the index. pace: where
    the cuts would not reach the budget, all of them take more, by even steps; else the last one takes the rest.
    from_dense: always cut by the weights of the first training. tolerance: without a budget, the loss of validation
    accuracy at which "tune" stops.
    """

    p: float = 0.5
    q: float = 1.0
    eta: float = 0.0
    gamma: float = 1.0
    beta: float = 0.9
    scope: str = "layer"
    variant: str = "tune"
    start: str = "given"
    iterations: int = 0
    ratio: float = 0.0
    pace: bool = True
    from_dense: bool = False
    tolerance: float = 0.02

    def prune(self, network: nn.Module, task: PruneTask) -> Masks:
        """Cut and train in turns, in place; the masks after the last cut."""
        rule = self._rule()
        # What can't be met is refused before the first epoch.
        task.keep(task.units.norms(network))
        key = self._key(network, task)
        notes = reinitialize(network, task.seed) if self.start == "scratch" else ()
        cutter = _cutter(task, rule)
        plan = self.training_epochs(task, lambda: cutter.needed(task.units.norms(network)))
        work = _Work(self, cutter, network, task, plan, key, deepcopy(network.state_dict()))
        state = work.first(notes)
        while not state.stopped:
            state = work.iteration(state)
        task.units.apply(network, state.masks)
        task.record["pqi"] = {**state.curves, "stopped": state.stopped}
        task.notes.extend((*state.notes, work.summary(state)))
        return task.units.masks(state.masks)

    @property
    def trains_first(self) -> bool:
        """Whether the dense network is trained before the first cut."""
        return self.variant == "paper" or (self.variant == "tune" and self.start == "scratch")

    def _rule(self) -> Rule:
        check_choice("sap: variant", self.variant, VARIANTS)
        check_choice("sap: start", self.start, STARTS)
        if self.iterations < 0:
            raise UsageError(f"sap: iterations = {self.iterations} must be at least 0")
        if not 0 <= self.tolerance <= 1:
            raise UsageError(f"sap: tolerance = {self.tolerance:g} must be in [0, 1]")
        return Rule(self.p, self.q, self.eta, self.gamma, self.beta, self.scope, self.ratio)

    def training_epochs(self, task: PruneTask, needed: Callable[[], int]) -> tuple[int, ...]:
        """Epochs of each training: the one before the first cut (0 for none), and the one after each cut."""
        if self.variant == "oneshot":
            cuts = self.iterations or (1 if task.free else needed())
            return (0,) * (cuts + 1)
        epochs, first = need_training("sap", task).table.epochs, int(self.trains_first)
        least = max(1, self.iterations) + first
        if epochs < least:
            raise UsageError(
                f"sap: {epochs} epochs are too few to train {least} times ({self.variant} from {self.start} weights)",
                f"give --epochs {least} or more" + (", or fewer iterations" if self.iterations else ""),
            )
        last = math.ceil(LAST_SHARE * epochs) if self.variant == "tune" and not task.free else 1
        most = epochs - last + 1 - first
        if task.free or self.variant == "paper":
            most = min(most, epochs // EPOCHS_EACH - first)
        cuts = self.iterations or max(1, most if task.free else min(needed(), most))
        return (*((0,) if not first else ()), *_shared(epochs, cuts + first, last))

    def _key(self, network: nn.Module, task: PruneTask) -> str:
        training = task.training
        learned = (training.table, training.seed, len(training.split)) if training else ()
        settings = (self, learned, task.rules, task.counts, task.seed, dict(task.units.sizes))
        return models.key(repr(settings), [network], {})


@dataclass(frozen=True)
class _State:
    """step: completed trainings. last: whether the last cut is made. before, dense: states to return to."""

    step: int
    masks: dict[str, Tensor]
    curves: dict[str, Any]
    notes: tuple[str, ...] = ()
    last: bool = False
    stopped: str = ""
    before: dict[str, Any] = field(default_factory=dict)
    dense: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _Work:
    """plan: epochs of each training. start: the weights that a rewinding training begins with."""

    options: Sap
    cutter: CutSchedule
    network: nn.Module
    task: PruneTask
    plan: tuple[int, ...]
    key: str
    start: Mapping[str, Any]

    def first(self, notes: tuple[str, ...]) -> _State:
        """The state of an interrupted run, or the initial one."""
        training = self.task.training
        found = models.load_state(training.scratch / "sap.pt", self.key) if training else None
        if found is not None:
            self.network.load_state_dict(found.pop("network"))
            found["notes"] = tuple(found["notes"])
            return _State(**found)
        names = self.task.units.sizes
        curves = {**{c: [] for c in CURVES}, **{c: {n: [] for n in names} for c in ("layers", "kept")}}
        return _State(0, self.task.units.all(), curves, notes)

    def iteration(self, state: _State) -> _State:
        """Train, measure, stop or cut, and save."""
        done = state.step
        self._train(state)
        norms = self.task.units.norms(self.network)
        state = replace(self._measured(state, norms), step=state.step + 1)
        if self.options.from_dense and not state.dense:
            state = replace(state, dense=norms)
        state = self._judged(state, state.dense or norms)
        if training := self.task.training:
            saved = {**vars(state), "notes": list(state.notes), "network": self.network.state_dict()}
            models.save_state(training.scratch / "sap.pt", self.key, saved)
            if distributed.rank() == 0:
                shutil.rmtree(self._folder(done), ignore_errors=True)
        return state

    def summary(self, state: _State) -> str:
        """A sentence for the notes."""
        left = sum(int(keep.sum()) for keep in state.masks.values())
        share = left / max(1, sum(keep.numel() for keep in state.masks.values()))
        kind = "channels" if self.task.units.granularity == "channel" else "prunable weights"
        done = f"SAP stopped after {state.step - 1} cuts with {100 * share:.3g} % of the {kind}"
        return f"{done}, because {state.stopped}."

    def _folder(self, step: int) -> Path:
        return need_training("sap", self.task).scratch / f"iteration-{step:02d}"

    def _train(self, state: _State) -> None:
        if self.options.variant == "paper":
            self.network.load_state_dict(self.start)
        self.task.units.apply(self.network, state.masks)
        epochs = sum(self.plan[state.step :]) if state.last else self.plan[state.step]
        if not epochs:
            return
        training = need_training("sap", self.task)
        seed = training.seed if self.options.variant == "paper" else (training.seed + state.step) % 2**32
        job = train.TrainingJob(
            training.split, replace(training.table, epochs=epochs), seed, self._folder(state.step),
            training.teacher, training.validation,
        )  # fmt: skip
        stays = self.task.units.entries(state.masks, self.network)
        train.fit(training.deployed(self.network), job, masking_hooks(self.network, stays))

    def _measured(self, state: _State, norms: Mapping[str, Tensor]) -> _State:
        curves, rule, units = deepcopy(state.curves), self.cutter.rule, self.task.units
        left = {name: norms[name][state.masks[name]] for name in units.sizes}
        found = {name: pqi(values, rule.p, rule.q) for name, values in left.items()}
        for name, values in left.items():
            curves["layers"][name].append(found[name])
            curves["kept"][name].append(len(values))
        weight = sum(map(len, left.values())) or 1
        curves["iterations"].append(state.step)
        curves["counts"].append(None)
        curves["accuracy"].append(self._accuracy())
        curves["mean"].append(sum(found[name] * len(values) for name, values in left.items()) / weight)
        empty = [name for name, values in left.items() if not bool(values.any())]
        note = f"All that is left of {', '.join(empty)} is zero; the PQ index says nothing of it."
        return replace(state, curves=curves, notes=(*state.notes, note) if empty else state.notes)

    def _accuracy(self) -> float | None:
        training = self.task.training
        if training is None or not len(training.validation):
            return None
        objective, network = objective_of(training.table, None), training.deployed(self.network)
        right, count = train.robust_accuracy(
            network, training.validation, objective, seed=training.seed, limit=VALIDATED
        )
        return right / count

    def _judged(self, state: _State, scores: Mapping[str, Tensor]) -> _State:
        free = self.task.free
        if state.last:
            return replace(state, before={}, stopped="the budget is met")
        collapse = self._collapse(state.curves) if free and state.before else ""
        if collapse:
            self.network.load_state_dict(state.before["network"])
            return replace(
                state, masks=state.before["masks"], before={}, stopped=collapse, step=state.step - 1
            )
        if state.step == len(self.plan):
            return replace(state, before={}, stopped="all its iterations are done")
        before: dict[str, Any] = {}
        if free and self.options.variant == "tune":
            before = {"masks": state.masks, "network": deepcopy(self.network.state_dict())}
        return replace(self._cut(state, scores), before=before)

    def _collapse(self, curves: Mapping[str, Any]) -> str:
        accuracy = curves["accuracy"]
        if accuracy[-1] is not None and (loss := max(accuracy) - accuracy[-1]) > self.options.tolerance:
            return (
                f"the next cut lost {100 * loss:.1f} points of validation accuracy, more than the tolerance of "
                f"{100 * self.options.tolerance:.1f}"
            )
        if schedule.turned(curves["mean"]):
            return "after the next cut the PQ index fell again after it had risen: the network collapses"
        return ""

    def _cut(self, state: _State, scores: Mapping[str, Tensor]) -> _State:
        task, cutter, left = self.task, self._bounded(scores, state.masks), len(self.plan) - state.step
        paced = self.options.pace and not task.free and left > 1
        goal = cutter.excess(state.masks) ** ((left - 1) / left) if paced else math.inf
        after, rounds = cutter.next(scores, state.masks, goal)
        state.curves["counts"][-1] = rounds
        stuck = all(torch.equal(after[name], keep) for name, keep in state.masks.items())
        if task.free:
            why = "its count is 0 everywhere: the PQ index calls nothing superfluous any more"
            return replace(state, stopped=why) if stuck else replace(state, masks=after)
        if not stuck and left > 1 and cutter.excess(after) > 1:
            return replace(state, masks=after)
        notes = state.notes
        if stuck and left > 1 and cutter.excess(state.masks) > 1:
            found = (
                f"After {state.step - 1} cuts SAP's count was 0 everywhere, short of the budget: the last cut"
            )
            notes = (*notes, f"{found} took the rest at once.")
        return replace(state, masks=self._last(scores, state.masks), notes=notes, last=True)

    def _bounded(self, scores: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> CutSchedule:
        """A schedule that takes no more channels of a group than the budget: the last cut finds fast counts."""
        if self.task.free or self.task.units.granularity != "channel":
            return self.cutter
        allowed = self.task.keep(schedule.energy(scores, masks))
        return replace(self.cutter, least={n: int((keep & masks[n]).sum()) for n, keep in allowed.items()})

    def _last(self, scores: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        task, ranking = self.task, schedule.alive(scores, masks)
        if task.units.granularity == "channel":
            ranking = schedule.energy(scores, masks)
        if task.units.granularity == "weight" and task.counts is None:
            total = sum(int(keep.sum()) for keep in masks.values()) - task.quota()
            chosen = self.cutter.exactly(scores, masks, total)
            ranking = {n: w.clamp(max=0) + chosen[n] for n, w in ranking.items()} if chosen else ranking
        return {name: keep & masks[name] for name, keep in task.keep(ranking).items()}


def _cutter(task: PruneTask, rule: Rule) -> CutSchedule:
    units, limits = task.units, task.rules.limits
    if units.granularity == "2:4":
        least = dict.fromkeys(units.sizes, 0)
    elif units.granularity == "channel":
        least = {name: max(1, -int(-task.rules.floor * n // 1)) for name, n in units.sizes.items()}
    else:
        least = dict(task.counts or task.floors())

    def excess(masks: Mapping[str, Tensor]) -> float:
        left = {name: int(keep.sum()) for name, keep in masks.items()}
        if task.free:
            return 0.0
        if units.granularity != "channel":
            return sum(left.values()) / task.quota()
        cost = task.costs.cost(left)
        return max(cost[metric] / limit for metric, limit in limits.items())

    return CutSchedule(units, rule, least, excess)


def _shared(epochs: int, trainings: int, last: int) -> tuple[int, ...]:
    """Epochs of each training, at least one: the last gets its due, the others share the rest evenly."""
    if trainings == 1:
        return (epochs,)
    last = min(max(last, -(-epochs // trainings)), epochs - (trainings - 1))
    each, more = divmod(epochs - last, trainings - 1)
    return (*(each + (i < more) for i in range(trainings - 1)), last)
