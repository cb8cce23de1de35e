"""What training makes small: the loss on labels, on adversarial images, and the distance to a teacher's answers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeprune.errors import UsageError
from edgeprune.models import full, logits, modes
from edgeprune.quantities import eps_of, suggest
from edgeprune.recipe import OBJECTIVES, TuneTable
from edgeprune.train import adversarial
from edgeprune.train.adversarial import Ball


@dataclass(frozen=True)
class Objective:
    """The loss of one batch, as a recipe's `tune` table decides it; call it with a network in training mode.

    kind: "natural": CE(f(x), y).
        "fgsm", "pgd": beta CE(f(x), y) + (1 - beta) CE(f(x'), y), with x' made by one or by several gradient steps;
        beta 1 makes no attack, and with beta 0 only x' goes through the network.
        "trades": CE(f(x), y) + trades KL(softmax(f(x)) || softmax(f(x'))), Zhang et al. 2019.
    ball, steps, step: how x' is made (`train.adversarial`).
    distill, temperature, teacher: with a teacher t each CE becomes `distillation` from t(x), on the same image as
        the CE; t sees the clean image always. TRADES' whole loss gets weight 1 - distill, and the teacher's part
        is on x' (Goldblum et al. 2020).

    Raises:
        UsageError: an unknown kind, or a number out of its range.
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
        if self.kind not in OBJECTIVES:
            found = f"tune.objective = {self.kind!r} is not one of {', '.join(OBJECTIVES)}"
            raise UsageError(found, suggest(self.kind, OBJECTIVES))
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
        wanted = self._wanted(x)
        adversarial = self.attack(module, x, y, generator)
        if self.kind == "trades":
            return self._trades(_together(module, x, adversarial), y, wanted)

        def part(answer: Tensor) -> Tensor:
            if wanted is None:
                return functional.cross_entropy(answer, y)
            return distillation(answer, wanted, y, self.distill, self.temperature)

        return _hybrid(module, (x, adversarial), self.beta if self.attacks else 1.0, part)

    def attack(self, module: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        """The adversarial images that it trains on, made in evaluation mode; `x` itself where it makes none."""
        if not self.attacks:
            return x
        if self.kind == "trades":
            return adversarial.trades(
                module, x, self.ball, steps=self.steps, step=self.step, generator=generator
            )
        return adversarial.perturb(
            module, x, y, self.ball, steps=self.steps, step=self.step, generator=generator
        )

    def _wanted(self, x: Tensor) -> Tensor | None:
        if self.teacher is None or self.distill == 0:
            return None
        with modes(None, self.teacher), torch.no_grad():
            return full(logits(self.teacher, x))

    def _trades(self, answers: tuple[Tensor, Tensor], y: Tensor, wanted: Tensor | None) -> Tensor:
        clean, moved = answers
        loss = functional.cross_entropy(clean, y) + self.trades * _divergence(clean, moved, 1.0)
        if wanted is None:
            return loss
        taught = self.temperature**2 * _divergence(wanted, moved, self.temperature)
        return (1 - self.distill) * loss + self.distill * taught


def of_table(table: TuneTable, teacher: nn.Module | None) -> Objective:
    """The objective that a recipe asks for; the teacher counts where `table.distill` is more than 0."""
    ball = Ball(table.norm, eps_of(table.eps, table.norm))
    steps = 1 if table.objective == "fgsm" else table.attack_steps
    usual = adversarial.FGSM_REACH if table.objective == "fgsm" else adversarial.PGD_REACH / max(1, steps)
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


def hybrid_loss(module: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, beta: float) -> Tensor:
    """beta CE(f(x), y) + (1 - beta) CE(f(x'), y), each the mean over its own images; both in one batch.

    With beta 1 or 0 the images without weight do not go through the network, so batch-norm does not see them.
    """
    if not 0 <= beta <= 1:
        raise UsageError(f"beta = {beta} must be between 0 and 1")
    return _hybrid(module, (x, x_adv), beta, lambda answer: functional.cross_entropy(answer, y))


def distillation(
    student_logits: Tensor, teacher_logits: Tensor, y: Tensor, weight: float, temperature: float
) -> Tensor:
    """(1 - weight) CE(student, y) + weight T^2 KL(softmax(teacher / T) || softmax(student / T)).

    Means over the images. Hinton et al. 2015; T^2 keeps the gradient's size the same at every temperature.
    """
    divergence = _divergence(teacher_logits.detach(), student_logits, temperature)
    return (1 - weight) * functional.cross_entropy(student_logits, y) + weight * temperature**2 * divergence


def _hybrid(
    module: nn.Module, images: tuple[Tensor, Tensor], beta: float, part: Callable[[Tensor], Tensor]
) -> Tensor:
    clean, adversarial = images
    if beta in (0, 1):
        return part(full(logits(module, clean if beta else adversarial)))
    on_clean, on_adversarial = _together(module, clean, adversarial)
    return beta * part(on_clean) + (1 - beta) * part(on_adversarial)


def _together(module: nn.Module, clean: Tensor, adversarial: Tensor) -> tuple[Tensor, Tensor]:
    answer = full(logits(module, torch.cat([clean, adversarial])))
    return answer[: len(clean)], answer[len(clean) :]


def _divergence(wanted: Tensor, answer: Tensor, temperature: float) -> Tensor:
    """KL(softmax(wanted / T) || softmax(answer / T)), mean over the images; gradients flow into both."""
    return functional.kl_div(
        functional.log_softmax(answer / temperature, dim=1),
        functional.log_softmax(wanted / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )
