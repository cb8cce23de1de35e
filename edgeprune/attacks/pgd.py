"""PGD: projected gradient steps on the cross-entropy from random points of the ball.

A. Madry, A. Makelov, L. Schmidt, D. Tsipras and A. Vladu, Towards deep learning models resistant to adversarial
attacks, ICLR 2018. An image is broken by any point of its walk, not by the last alone.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from edgeprune.attacks._base import Attack, Inputs
from edgeprune.errors import UsageError
from edgeprune.models import AttackResult, Logits, as_logits, loss_and_gradient, sequentially, wrong
from edgeprune.train import PGD_REACH, Ball


@dataclass(frozen=True)
class Pgd(Attack):
    """Options of PGD.

    steps: of each walk. step: their length in units of pixels; 0 for 2.5 eps / steps. restarts: walks of each image,
    every one from another random point.
    """

    gradients: ClassVar[bool] = True

    steps: int = 20
    step: float = 0.0
    restarts: int = 1

    def __post_init__(self) -> None:
        if self.steps < 1 or self.restarts < 1 or not self.step >= 0:
            raise UsageError(
                f"pgd can't walk with steps = {self.steps}, step = {self.step}, restarts = {self.restarts}",
                "steps and restarts must be at least 1, step 0 or more",
            )

    def perturb(self, given: Inputs) -> tuple[Tensor, Tensor]:
        """Walk from random points; later walks take the images that are not broken yet."""

        def walk(rows: Tensor) -> AttackResult:
            return self._walk(
                as_logits(given.model), given.x[rows], given.y[rows], given.ball, given.generator
            )

        return sequentially(given.x, [walk] * self.restarts, given.advance)

    def _walk(
        self, logits: Logits, x: Tensor, y: Tensor, ball: Ball, generator: torch.Generator
    ) -> AttackResult:
        size = self.step or PGD_REACH * ball.eps / self.steps
        found = ball.start(x, generator)
        queries = torch.zeros_like(y)
        row = torch.arange(len(x), device=x.device)
        for step in range(self.steps + 1):
            at, labels = found[row], y[row]
            if step < self.steps:
                loss = partial(functional.cross_entropy, target=labels, reduction="none")
                output, _, gradient = loss_and_gradient(logits, at, loss)
            else:
                with torch.no_grad():
                    output, gradient = logits(at), at
            queries[row] += 1
            stay = ~wrong(output, labels)
            row = row[stay]
            if step == self.steps or not len(row):
                break
            found[row] = ball.project(ball.step(at[stay], gradient[stay], size), x[row])
        broken = torch.ones_like(y, dtype=torch.bool)
        broken[row] = False
        return AttackResult(found, broken, queries)
