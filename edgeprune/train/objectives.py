"""Training losses: on labels, on adversarial images, and the divergence from a teacher's output."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeprune.errors import UsageError
from edgeprune.models import full, logits, modes
from edgeprune.quantities import check_choice, eps_of
from edgeprune.recipe import OBJECTIVES, TuneTable
from edgeprune.train.adversarial import FGSM_REACH, PGD_REACH, Ball, pgd, trades


@dataclass(frozen=True)
class Objective:
    """The loss of one batch, as a recipe's `tune` table sets it; call it with a network in training mode.

    kind: "natural": CE(f(x), y).
        "fgsm", "pgd": beta CE(f(x), y) + (1 - beta) CE(f(x'), y), with x' made by one or by several gradient steps;
        beta 1 makes no attack, and with beta 0 only x' goes through the network.
        "trades": CE(f(x), y) + trades KL(softmax(f(x)) || softmax(f(x'))), Zhang et al. 2019.
    distill, temperature, teacher: with a teacher t each CE becomes `distillation` from t(x), on the same image as
        the CE; the input of t is always the clean image. TRADES' whole loss gets weight 1 - distill, and the
        teacher's part is on x' (Goldblum et al. 2020).
    """

    kind: str
    ball: Ball
    steps: int
    step: float
    beta: float = 0.0
    trades: float = 6.0
    distill: float = 0.0
    temperature: float = 4.0
    teacher: nn.Module | None = None

    def __post_init__(self) -> None:
        check_choice("tune.objective", self.kind, OBJECTIVES)
        checks = (
            ("attack_steps", self.steps, self.steps >= 1, "at least 1"),
            ("attack_step", self.step, 0 < self.step < math.inf, "finite and more than 0"),
            ("beta", self.beta, 0 <= self.beta <= 1, "in [0, 1]"),
            ("trades", self.trades, 0 <= self.trades < math.inf, "finite and not negative"),
            ("distill", self.distill, 0 <= self.distill <= 1, "in [0, 1]"),
            ("temperature", self.temperature, 0 < self.temperature < math.inf, "finite and more than 0"),
        )
        for name, value, good, accepted in checks:
            if not good:
                raise UsageError(f"tune.{name} = {value} must be {accepted}")

    @property
    def attacks(self) -> bool:
        """Whether adversarial images are made at all."""
        return self.kind == "trades" or (self.kind != "natural" and self.beta < 1)

    def __call__(self, module: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        """The mean loss of a batch; gradients pass."""
        target = self._teacher_logits(x)
        moved = self.attack(module, x, y, generator)
        beta = self.beta if self.attacks else 1.0
        if self.kind != "trades" and beta in (0, 1):
            return self._supervised(full(logits(module, x if beta else moved)), target, y)
        # In one batch, so that batch-norm sees both.
        output = full(logits(module, torch.cat([x, moved])))
        on_clean, on_moved = output[: len(x)], output[len(x) :]
        if self.kind == "trades":
            return self._trades(on_clean, on_moved, target, y)
        clean_loss = self._supervised(on_clean, target, y)
        return beta * clean_loss + (1 - beta) * self._supervised(on_moved, target, y)

    def attack(self, module: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        """The adversarial images that it trains on, made in evaluation mode; `x` itself where it makes none."""
        if not self.attacks:
            return x
        if self.kind == "trades":
            return trades(module, x, self.ball, steps=self.steps, step=self.step, generator=generator)
        return pgd(module, x, y, self.ball, steps=self.steps, step=self.step, generator=generator)

    def _teacher_logits(self, x: Tensor) -> Tensor | None:
        if self.teacher is None or self.distill == 0:
            return None
        with modes(None, self.teacher), torch.no_grad():
            return full(logits(self.teacher, x))

    def _supervised(self, output: Tensor, target: Tensor | None, y: Tensor) -> Tensor:
        if target is None:
            return functional.cross_entropy(output, y)
        return distillation(output, target, y, self.distill, self.temperature)

    def _trades(self, clean: Tensor, moved: Tensor, target: Tensor | None, y: Tensor) -> Tensor:
        loss = functional.cross_entropy(clean, y) + self.trades * kl_divergence(clean, moved, 1.0)
        if target is None:
            return loss
        distilled = self.temperature**2 * kl_divergence(target, moved, self.temperature)
        return (1 - self.distill) * loss + self.distill * distilled


def objective_of(table: TuneTable, teacher: nn.Module | None) -> Objective:
    """The objective of a recipe; the teacher counts where `table.distill` is more than 0."""
    ball = Ball(table.norm, eps_of(table.eps, table.norm))
    steps = 1 if table.objective == "fgsm" else table.attack_steps
    usual = FGSM_REACH if table.objective == "fgsm" else PGD_REACH / max(1, steps)
    return Objective(
        kind=table.objective,
        ball=ball,
        steps=steps,
        step=table.attack_step or usual * ball.eps,
        beta=table.beta,
        trades=table.trades,
        distill=table.distill,
        temperature=table.temperature,
        teacher=teacher,
    )


def distillation(
    student_logits: Tensor, teacher_logits: Tensor, y: Tensor, weight: float, temperature: float
) -> Tensor:
    """(1 - weight) CE(student, y) + weight T^2 KL(softmax(teacher / T) || softmax(student / T)).

    Means over the images. Hinton et al. 2015; T^2 keeps the gradient's size the same at every temperature.
    """
    divergence = kl_divergence(teacher_logits.detach(), student_logits, temperature)
    return (1 - weight) * functional.cross_entropy(student_logits, y) + weight * temperature**2 * divergence


def kl_divergence(target: Tensor, output: Tensor, temperature: float) -> Tensor:
    """KL(softmax(target / T) || softmax(output / T)), mean over the images; gradients flow into both."""
    return functional.kl_div(
        functional.log_softmax(output / temperature, dim=1),
        functional.log_softmax(target / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )
