"""FAB-T: the nearest image that is classified otherwise, across the boundary to one likely class after another.

F. Croce and M. Hein, Minimally distorted adversarial examples with a fast adaptive boundary attack, ICML 2020, in
the targeted version of AutoAttack, whose parameters are the defaults. It is deterministic and does not depend on
the scale of the logits.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from edgeprune.attacks._apgd import Task, targets
from edgeprune.attacks._base import Attack, Inputs
from edgeprune.attacks._fab import nearest
from edgeprune.attacks._onnx_session import alone
from edgeprune.errors import UsageError
from edgeprune.models import AttackResult, Logits, as_logits, in_parallel, sequentially


@dataclass(frozen=True)
class FabT(Attack):
    """Options of FAB-T.

    classes: how many target classes, likeliest first; of K classes at most K - 1. steps: for each of them.
    """

    gradients: ClassVar[bool] = True

    classes: int = 9
    steps: int = 100

    def __post_init__(self) -> None:
        if self.steps < 1 or self.classes < 1:
            raise UsageError(
                f"fab-t can't search with classes = {self.classes}, steps = {self.steps}",
                "both must be at least 1",
            )

    def perturb(self, given: Inputs) -> tuple[Tensor, Tensor]:
        """Search at each target's boundary until an image in the ball is found."""
        model, x, y, ball = given.model, given.x, given.y, given.ball
        with torch.no_grad():
            ranked = targets(as_logits(model)(x), y, self.classes)
        faster = alone(model, x, ranked.numel() * self.steps)

        def search(target: Tensor, one: nn.Module | Logits, rows: Tensor) -> AttackResult:
            task = Task(x, y, target).only(rows)
            found = nearest(as_logits(one), task, ball.norm, steps=self.steps, enough=ball.eps, look=faster)
            return AttackResult(found.images, found.distance <= ball.eps, found.queries)

        def run(target: Tensor, rows: Tensor) -> AttackResult:
            return in_parallel(model, rows, partial(search, target))

        images, queries = sequentially(
            x, [partial(run, target) for target in ranked.unbind(1)], given.advance
        )
        return images, queries + 1
