"""APGD-CE: steps with momentum on the cross-entropy whose size adapts to each image; parameter-free.

F. Croce and M. Hein, Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
attacks, ICML 2020. The defaults are those of AutoAttack's standard evaluation.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from edgeprune.attacks._apgd import climb_in_turn, cross_entropies
from edgeprune.attacks._base import Attack, Inputs
from edgeprune.errors import UsageError


@dataclass(frozen=True)
class ApgdCe(Attack):
    """Options of APGD-CE.

    steps: of each run. restarts: runs from different random points. rho: of the steps between two checkpoints this
    share must raise the loss, or the step is halved.
    """

    gradients: ClassVar[bool] = True

    steps: int = 100
    restarts: int = 1
    rho: float = 0.75

    def __post_init__(self) -> None:
        if self.steps < 1 or self.restarts < 1 or not 0 <= self.rho <= 1:
            raise UsageError(
                f"apgd-ce can't run with steps = {self.steps}, restarts = {self.restarts}, rho = {self.rho}",
                "steps and restarts must be at least 1, rho between 0 and 1",
            )

    def perturb(self, given: Inputs) -> tuple[Tensor, Tensor]:
        """Run from random points; later runs take the images that are not broken yet."""
        runs = [given.y] * self.restarts
        return climb_in_turn(given, runs, loss=cross_entropies, steps=self.steps, rho=self.rho)
