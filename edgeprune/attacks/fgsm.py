"""FGSM: one step of eps along the sign (L2: the direction) of the gradient of the cross-entropy.

I. Goodfellow, J. Shlens and C. Szegedy, Explaining and harnessing adversarial examples, ICLR 2015. The cheapest
attack: an image that survives it may fall to any other.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from edgeprune.attacks._base import Attack, Inputs
from edgeprune.models import as_logits, loss_and_gradient


@dataclass(frozen=True)
class Fgsm(Attack):
    """No options."""

    gradients: ClassVar[bool] = True

    def perturb(self, given: Inputs) -> tuple[Tensor, Tensor]:
        """x + eps sign(gradient), clipped to [0, 1]; deterministic."""
        loss = partial(functional.cross_entropy, target=given.y, reduction="none")
        _, _, gradient = loss_and_gradient(as_logits(given.model), given.x, loss)
        images = given.ball.project(given.ball.step(given.x, gradient, given.ball.eps), given.x)
        return images, torch.ones_like(given.y)
