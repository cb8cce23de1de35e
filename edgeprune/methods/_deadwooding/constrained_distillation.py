"""Distillation as constraints: close to a teacher on clean images, and close to it or right on adversarial ones.

The loss of a batch is L + sum of lambda_c max(0, g_c), divided by 1 + sum of lambda_c, so that the gradient does not
grow with the multipliers. L is the loss of the objective, or CE(f(x), y).
g_kd = T^2 KL(softmax(t(x) / T) || softmax(f(x) / T)) - eps_kd and g_adv = D(f(x')) - eps_adv, with x' from the attack
of the objective. After each epoch a multiplier rises by its step times its mean violation.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeprune import distributed
from edgeprune.data import Split
from edgeprune.methods._deadwooding import shrinkage
from edgeprune.models import full, logits, modes
from edgeprune.train import Objective, fastest_config, kl_divergence, restored_device, seeded_generator

DISTANCES = ("teacher_clean", "ce", "tv", "w1")
OWN_IMAGES = 1024
OWN_BATCH = 256


@dataclass(frozen=True)
class Metric:
    """Distance of logits from the teacher's or from the label, the mean over the images.

    kind: "teacher_clean": T^2 KL from the teacher's softmax on the clean image; "tv", "w1": total variation and
    1-Wasserstein distance over the class numbers between the two; "ce": cross-entropy of the label.
    """

    kind: str = "teacher_clean"
    temperature: float = 4.0

    def __call__(self, output: Tensor, target: Tensor, y: Tensor) -> Tensor:
        """From logits (N, K) to the teacher's `target` (N, K) or labels y int64 (N,): a scalar >= 0."""
        if self.kind == "ce":
            return functional.cross_entropy(output, y)
        if self.kind == "teacher_clean":
            return divergence(target, output, self.temperature)
        change = output.softmax(1) - target.softmax(1)
        if self.kind == "tv":
            return change.abs().sum(1).mean() / 2
        return change.cumsum(1).abs().sum(1).mean()


@dataclass(frozen=True)
class Distillation:
    """The loss of stage B; `loss`, `after_epoch`, `state` and `restore` are hooks of `train.loop.fit`.

    task: L, "objective" or "ce" on clean images. metric: D. slack: eps of each active constraint, "kd" and "adv".
    sums: over the batches of this epoch. curves: per epoch the multiplier, the mean distance and the mean violation.
    """

    objective: Objective
    task: str
    teacher: nn.Module
    metric: Metric
    slack: Mapping[str, float]
    steps: Mapping[str, float]
    bank: shrinkage.Multipliers
    sums: dict[str, Tensor] = field(default_factory=dict)
    curves: dict[str, list[float]] = field(default_factory=dict)

    def loss(self, module: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        """The loss of a batch; clean and adversarial images are one forward pass."""
        adversarial = self.task == "objective" and self.objective.attacks
        if not self.slack:
            return (self.objective if adversarial else on_labels)(module, x, y, generator)
        with torch.no_grad():
            target = full(logits(self.teacher, x))
        robust = "adv" in self.slack or adversarial
        seen = torch.cat([x, self.objective.attack(module, x, y, generator)]) if robust else x
        output = full(logits(module, seen))
        clean, moved = output[: len(x)], output[len(x) :]
        found: dict[str, Tensor] = {}
        if "kd" in self.slack:
            found["kd"] = divergence(target, clean, self.metric.temperature)
        if "adv" in self.slack:
            found["adv"] = self.metric(moved, target, y)
        over = {name: (value - self.slack[name]).clamp(min=0) for name, value in found.items()}
        self._count(found, over)
        loss, weight = self._task(clean, moved, y) if adversarial else functional.cross_entropy(clean, y), 1.0
        for name, violation in over.items():
            multiplier = float(self.bank.values[name])
            loss, weight = loss + multiplier * violation, weight + multiplier
        return loss / weight

    def after_epoch(self, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        """The dual step."""
        if not self.slack:
            return
        means = {name: float(total / self.sums["batches"]) for name, total in self.sums.items()}
        self.sums.clear()
        for name, multiplier in self.bank.values.items():
            found = {
                f"lambda_{name}": float(multiplier), name: means[name], f"{name} over": means[f"{name} over"],
            }  # fmt: skip
            for curve, value in found.items():
                self.curves.setdefault(curve, []).append(value)
        self.bank.update({name: means[f"{name} over"] for name in self.slack}, self.steps)

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        curves = {name: [*curve] for name, curve in self.curves.items()}
        return {**self.bank.state(), "sums": dict(self.sums), "curves": curves}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Resume. Longer curves stay: the best epoch may be an earlier one."""
        self.bank.restore(state)
        self.sums.clear()
        self.sums.update(state["sums"])
        longer = {n: c for n, c in state["curves"].items() if len(c) > len(self.curves.get(n, []))}
        self.curves.update({name: [*curve] for name, curve in longer.items()})

    def _task(self, clean: Tensor, moved: Tensor, y: Tensor) -> Tensor:
        on_clean = functional.cross_entropy(clean, y)
        if self.objective.kind == "trades":
            return on_clean + self.objective.trades * divergence(clean, moved, 1.0)
        beta = self.objective.beta
        return beta * on_clean + (1 - beta) * functional.cross_entropy(moved, y)

    def _count(self, found: Mapping[str, Tensor], over: Mapping[str, Tensor]) -> None:
        named = {**found, **{f"{name} over": value for name, value in over.items()}}
        values = torch.stack([value.detach().double() for value in named.values()])
        distributed.all_reduce_mean_([values])
        for name, value in zip((*named, "batches"), (*values, torch.ones_like(values[0])), strict=True):
            self.sums[name] = self.sums[name] + value if name in self.sums else value


def teacher_distance(
    teacher: nn.Module, split: Split, objective: Objective, metric: Metric, seed: int
) -> tuple[float, float]:
    """The teacher's own distance under the attack, and that of constant logits, on at most 1,024 images."""
    rows = torch.arange(min(OWN_IMAGES, len(split)))
    total = torch.zeros(2, dtype=torch.float64)
    with restored_device([teacher]), modes(None, teacher):
        placement = fastest_config([teacher], split.take(rows[:2]))
        for number, (x, y) in enumerate(split.batches(OWN_BATCH, rows)):
            images, labels = placement.images(x), y.to(placement.device)
            moved = objective.attack(teacher, images, labels, seeded_generator(seed, number, "slack"))
            with torch.no_grad():
                target, output = full(logits(teacher, images)), full(logits(teacher, moved))
                pair = [metric(each, target, labels) for each in (output, torch.zeros_like(output))]
            total += len(x) * torch.stack(pair).double().cpu()
    own, nothing = distributed.broadcast_(total / len(rows)).tolist()
    return own, nothing


def divergence(target: Tensor, output: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(target / T) || softmax(output / T)) of logits (N, K), the mean over the images."""
    return temperature**2 * kl_divergence(target, output, temperature)


def on_labels(module: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
    """Mean cross-entropy of clean images, as a hook of `train.loop.fit`."""
    return functional.cross_entropy(full(logits(module, x)), y)
