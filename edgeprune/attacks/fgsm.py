"""FGSM: one step of eps along the sign (L2: the direction) of the gradient of the cross-entropy.

I. Goodfellow, J. Shlens and C. Szegedy, Explaining and harnessing adversarial examples, ICLR 2015. The cheapest
attack: what it leaves standing says little, what it breaks is broken.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor
from torch.nn import functional

from edgeprune.attacks._base import Attack, Model
from edgeprune.models import Advance, as_logits, loss_and_gradient
from edgeprune.train import Ball


@dataclass(frozen=True)
class Fgsm(Attack):
    """No options."""

    gradients: ClassVar[bool] = True

    def perturb(
        self, model: Model, x: Tensor, y: Tensor, ball: Ball, generator: Generator, advance: Advance
    ) -> tuple[Tensor, Tensor]:
        """x + eps sign(gradient), clipped to [0, 1]; draws no chance."""
        _, _, gradient = loss_and_gradient(
            as_logits(model), x, lambda a: functional.cross_entropy(a, y, reduction="none")
        )
        return ball.project(ball.step(x, gradient, ball.eps), x), torch.ones_like(y)
