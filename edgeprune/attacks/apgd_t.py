"""APGD-T: APGD on the targeted difference of logits ratio, towards one likely class after another.

F. Croce and M. Hein, Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
attacks, ICML 2020. The loss does not vanish where the network is sure of itself, unlike the cross-entropy. With two
or three classes, where it is undefined, the bare margin between the logits takes its place. The defaults are those
of AutoAttack's standard evaluation.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from edgeprune.attacks._apgd import climb_in_turn, targeted_dlr, targets
from edgeprune.attacks._base import Attack, Inputs
from edgeprune.errors import UsageError
from edgeprune.models import as_logits


@dataclass(frozen=True)
class ApgdT(Attack):
    """Options of APGD-T.

    classes: how many target classes, likeliest first; of K classes at most K - 1. steps: for each of them. rho: of
    the steps between two checkpoints this share must raise the loss, or the step is halved.
    """

    gradients: ClassVar[bool] = True

    classes: int = 9
    steps: int = 100
    rho: float = 0.75

    def __post_init__(self) -> None:
        if self.steps < 1 or self.classes < 1 or not 0 <= self.rho <= 1:
            raise UsageError(
                f"apgd-t can't run with classes = {self.classes}, steps = {self.steps}, rho = {self.rho}",
                "classes and steps must be at least 1, rho between 0 and 1",
            )

    def perturb(self, given: Inputs) -> tuple[Tensor, Tensor]:
        """Run towards the second likeliest class, then towards the third, and so on."""
        with torch.no_grad():
            ranked = targets(as_logits(given.model)(given.x), given.y, self.classes)
        images, queries = climb_in_turn(
            given, ranked.unbind(1), loss=targeted_dlr, steps=self.steps, rho=self.rho
        )
        return images, queries + 1
