"""PGD: projected gradient steps on the cross-entropy from random points of the ball.

A. Madry, A. Makelov, L. Schmidt, D. Tsipras and A. Vladu, Towards deep learning models resistant to adversarial
attacks, ICLR 2018. An image is broken by any point of its walk, not by the last alone.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor
from torch.nn import functional

from edgeprune.attacks._base import Attack, Model
from edgeprune.errors import UsageError
from edgeprune.models import Advance, AttackResult, Logits, as_logits, loss_and_gradient, sequentially, wrong
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

    def perturb(
        self, model: Model, x: Tensor, y: Tensor, ball: Ball, generator: Generator, advance: Advance
    ) -> tuple[Tensor, Tensor]:
        """Walk; the images that still stand walk again."""
        ask = as_logits(model)

        def walk(rows: Tensor) -> AttackResult:
            return self._walk(ask, x[rows], y[rows], ball, generator)

        return sequentially(x, [walk] * self.restarts, advance)

    def _walk(
        self, ask: Logits, x: Tensor, y: Tensor, ball: Ball, generator: torch.Generator
    ) -> AttackResult:
        size = self.step or PGD_REACH * ball.eps / self.steps
        found = ball.start(x, generator)
        queries = torch.zeros_like(y)
        row = torch.arange(len(x), device=x.device)
        for step in range(self.steps + 1):
            at, labels = found[row], y[row]
            if step < self.steps:
                answer, _, gradient = loss_and_gradient(ask, at, _cross_entropies(labels))
            else:
                with torch.no_grad():
                    answer, gradient = ask(at), at
            queries[row] += 1
            stay = ~wrong(answer, labels)
            row = row[stay]
            if step == self.steps or not len(row):
                break
            found[row] = ball.project(ball.step(at[stay], gradient[stay], size), x[row])
        broken = torch.ones_like(y, dtype=torch.bool)
        broken[row] = False
        return AttackResult(found, broken, queries)


def _cross_entropies(y: Tensor) -> Logits:
    return lambda answer: functional.cross_entropy(answer, y, reduction="none")
