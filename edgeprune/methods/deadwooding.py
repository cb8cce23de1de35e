"""Shrink what will be removed by Lagrange multipliers, cut once, distil under constraints; a reconstruction.

Kaur, Fioretto and Salekin, "Deadwooding: Robust Global Pruning for Deep Neural Networks" (2022). Only the outline is
public: Lagrangian duals, one global cut by magnitude, then distillation and FGSM. docs/deadwooding.md says which parts
are ours. Stage A (`_deadwooding.shrinkage`) shrinks what the budget would remove now. Stage B
(`_deadwooding.constrained_distillation`) trains the cut network close to the dense one on clean and on adversarial
images; the epoch with the best validation accuracy under the attack is kept.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from edgeprune import models, train
from edgeprune.errors import UsageError
from edgeprune.methods._base import PruneTask, Training, TrainingMethod, need_training
from edgeprune.methods._deadwooding import constrained_distillation, shrinkage
from edgeprune.quantities import check_choice
from edgeprune.records import Masks
from edgeprune.train import masking_hooks, objective_of

SCORES = ("auto", "raw", "layer")
LOSSES = ("objective", "ce")
RANGES = {
    "stage_a": (0.0, 0.99),
    "temperature": (0.01, 1000.0),
    **dict.fromkeys(("rho_s", "tau", "fixed_penalty", "cap"), (0.0, 1e6)),
    **dict.fromkeys(("rho_kd", "init_kd", "rho_adv", "init_adv"), (0.0, 1e6)),
    **dict.fromkeys(("eps_kd", "eps_adv"), (-1e6, 1e6)),
}


@dataclass(frozen=True)
class Deadwooding(TrainingMethod):
    """Dual sparsification, a global cut, robust distillation.

    stage_a: share of the epochs for stage A; 0 cuts at once. loss_a: its loss, "objective" or "ce". rho_s: its dual
    step. tau: slack, as a share of sigma. per_weight: a multiplier for each weight instead of each layer.
    fixed_penalty: if more than 0, a constant multiplier without dual steps. score: "raw" magnitudes, or relative to
    their "layer"; "auto" is raw for weights, layer for channels. loss_b: the loss of stage B besides the constraints,
    "objective" or "ce" on clean images. rho_*, init_*, eps_*: dual step, initial multiplier and slack of the
    constraints on clean (kd) and adversarial (adv) images; step and multiplier 0 disable a constraint, a negative
    slack is the teacher's own value on validation images. distance: from the logits on x' to the teacher's on x
    ("teacher_clean": T^2 KL, "tv", "w1"), or to the label ("ce"). temperature: T. cap: upper limit of the multipliers.
    """

    stage_a: float = 0.25
    loss_a: str = "objective"
    rho_s: float = 10.0
    tau: float = 0.0
    per_weight: bool = False
    fixed_penalty: float = 0.0
    score: str = "auto"
    loss_b: str = "objective"
    rho_kd: float = 0.1
    init_kd: float = 0.0
    eps_kd: float = -1.0
    rho_adv: float = 0.5
    init_adv: float = 1.0
    eps_adv: float = -1.0
    distance: str = "teacher_clean"
    temperature: float = 4.0
    cap: float = 10.0

    def __post_init__(self) -> None:
        check_choice("deadwooding: score", self.score, SCORES)
        check_choice("deadwooding: distance", self.distance, constrained_distillation.DISTANCES)
        check_choice("deadwooding: loss_a", self.loss_a, LOSSES)
        check_choice("deadwooding: loss_b", self.loss_b, LOSSES)
        if self.per_weight not in (True, False):
            raise UsageError(f"deadwooding: per_weight = {self.per_weight!r} must be true or false")
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not low <= value <= high:
                raise UsageError(f"deadwooding: {name} = {value!r} must be a number from {low:g} to {high:g}")

    def prune(self, network: nn.Module, task: PruneTask) -> Masks:
        """Train, cut and train; the masks of the cut."""
        training = need_training("deadwooding", task)
        teacher = training.teacher
        if teacher is None:
            teacher = training.deployed(deepcopy(network)).eval()
        file, key = training.scratch / "cut.pt", self._key([network, teacher], task, training)
        cut = models.load_state(file, key)
        if cut is None:
            cut = self._cut(network, task, training)
            models.save_state(file, key, cut)
        network.load_state_dict(cut["network"])
        distilled = self._distil(network, task, cut["masks"], teacher)
        violation = {"deadwood": cut["violation"], **distilled.pop("violation")}
        task.record["deadwooding"] = {**cut["curves"], **distilled, "violation": violation}
        return task.units.masks(cut["masks"])

    def _key(self, networks: Sequence[nn.Module], task: PruneTask, training: Training) -> str:
        budget = (task.rules, task.counts, dict(task.units.sizes))
        settings = (self, training.table, training.seed, len(training.split), *budget)
        return models.key(repr(settings), networks, {})

    def _cut(self, network: nn.Module, task: PruneTask, training: Training) -> dict[str, Any]:
        table = training.table
        table = replace(table, epochs=self.stages(table.epochs)[0], keep="last", distill=0.0)
        penalty = shrinkage.Penalty(self.rho_s, self.tau, self.fixed_penalty, self.per_weight, self.cap)

        def choose(norms: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            return task.keep(self.scores(task.units.granularity, norms))

        stage = shrinkage.begin(
            network, task.units, choose, penalty, table=table,
            steps=len(training.split) // min(table.batch, len(training.split)),
        )  # fmt: skip
        if table.epochs:
            hooks = train.Hooks(
                loss=None if self.loss_a == "objective" else constrained_distillation.on_labels,
                after_step=stage.shrink,
                after_epoch=stage.after_epoch, state=stage.state, restore=stage.restore,
            )  # fmt: skip
            job = train.TrainingJob(training.split, table, training.seed, training.scratch / "stage-a")
            train.fit(training.deployed(network), job, hooks)
        masks = choose(task.units.norms(network))
        task.units.apply(network, masks)
        return {
            "masks": dict(masks), "network": dict(network.state_dict()), "violation": stage.violation,
            "curves": {"lambda": stage.bank.history, "deadwood": stage.mass},
        }  # fmt: skip

    def _distil(
        self, network: nn.Module, task: PruneTask, masks: Mapping[str, Tensor], teacher: nn.Module
    ) -> dict[str, Any]:
        training = need_training("deadwooding", task)
        epochs = self.stages(training.table.epochs)
        table = replace(training.table, epochs=epochs[1], keep="best", distill=0.0)
        job = train.TrainingJob(
            training.split, table, training.seed, training.scratch / "stage-b", teacher, training.validation
        )
        stage = self._constraints(task, training, teacher)
        hooks = replace(
            masking_hooks(network, task.units.entries(masks, network)), loss=stage.loss, after_epoch=stage.after_epoch,
            state=stage.state, restore=stage.restore,
        )  # fmt: skip
        history = train.fit(training.deployed(network), job, hooks)
        over = {name: stage.curves.get(f"{name} over", []) for name in stage.slack}
        curves = {name: curve for name, curve in stage.curves.items() if not name.endswith(" over")}
        return {
            **curves, "violation": over, "slack": dict(stage.slack), "validation": list(history.validation),
            "best": history.best, "epochs": [*epochs],
        }  # fmt: skip

    def _constraints(
        self, task: PruneTask, training: Training, teacher: nn.Module
    ) -> constrained_distillation.Distillation:
        objective = objective_of(training.table, None)
        metric = constrained_distillation.Metric(self.distance, self.temperature)
        slack: dict[str, float] = {}
        if self.rho_kd or self.init_kd:
            # The teacher's distance from itself is 0.
            slack["kd"] = max(0.0, self.eps_kd)
        if not objective.attacks:
            task.notes.append(
                f"deadwooding with objective {training.table.objective}: stage B is distillation on clean images "
                "alone; robustness is not trained unless the objective is fgsm, pgd or trades."
            )
        elif self.rho_adv or self.init_adv:
            slack["adv"] = self.eps_adv
            if self.eps_adv < 0:
                own = constrained_distillation.teacher_distance(
                    teacher, training.validation, objective, metric, training.seed
                )
                slack["adv"] = self.slack(own, task)
        starts = {"kd": self.init_kd, "adv": self.init_adv}
        bank = shrinkage.Multipliers(
            {name: torch.tensor(starts[name], dtype=torch.float64) for name in slack}, self.cap
        )
        steps = {"kd": self.rho_kd, "adv": self.rho_adv}
        return constrained_distillation.Distillation(
            objective, self.loss_b, teacher, metric, slack, steps, bank
        )

    def stages(self, total: int) -> tuple[int, int]:
        """Epochs of stage A and of stage B, at least one for each where there are two."""
        if self.stage_a == 0 or total < 2:
            return 0, total
        first = min(total - 1, max(1, round(self.stage_a * total)))
        return first, total - first

    def scores(self, granularity: str, norms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Magnitudes, raw or relative to their layer."""
        by_channel = granularity == "channel"
        if self.score == "raw" or (self.score == "auto" and not by_channel):
            return dict(norms)
        if by_channel:
            # A channel's share of what its group holds: wide and narrow groups compete by what is lost.
            return {name: n**2 / (n**2).sum().clamp(min=shrinkage.TINY) for name, n in norms.items()}
        return {name: n / max(shrinkage.rms(n), shrinkage.TINY) for name, n in norms.items()}

    def slack(self, found: tuple[float, float], task: PruneTask) -> float:
        """The teacher's own distance; 0, with a note, where a constant output is no worse."""
        own, nothing = found
        if own < nothing:
            return own
        task.notes.append(
            f"deadwooding: the dense model is not robust itself (its distance under attack is {own:.3g}, that of "
            f"a constant output {nothing:.3g}), so the constraint on adversarial images has no slack."
        )
        return 0.0
