"""Keep the units whose removal would change the loss most, by a first-order expansion; needs labelled images.

Molchanov et al., "Importance Estimation for Neural Network Pruning" (2019), Eq. 8, with one gate where the group's
readers take the channel in: setting channel i to zero changes the loss of a batch by about -sum(w * dL/dw) over the
weights that read it, whatever batch-norm, activation or residual sum stands between. The score is the mean square of
that change over small batches: of its mean square, its root and its mean absolute value, the square shares a budget
out best over layers (in our trials on a ResNet-20).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeprune.errors import UsageError
from edgeprune.methods import PruneTask, ScoreMethod, need_images
from edgeprune.nn.progress import track


@dataclass(frozen=True)
class Taylor(ScoreMethod):
    """First-order change of the loss. images: how many to look at; batch: images per expansion."""

    images: int = 1024
    batch: int = 32

    def scores(self, network: nn.Module, task: PruneTask) -> dict[str, Tensor]:
        """Mean square of the expected change of the loss, per unit."""
        if self.images < 1 or self.batch < 1:
            raise UsageError(f"taylor: images = {self.images} and batch = {self.batch} must be at least 1")
        images, labels = need_images("taylor", task)
        images, labels = images[: self.images], labels[: self.images]
        parameters = dict(network.named_parameters())
        units = task.units
        total = {name: torch.zeros(n, dtype=torch.float64) for name, n in units.sizes.items()}
        starts = range(0, len(images), self.batch)
        for start in track(starts, len(starts), "taylor scores"):
            x, y = images[start : start + self.batch], labels[start : start + self.batch]
            network.zero_grad(set_to_none=True)
            functional.cross_entropy(task.logits(network, x), y, reduction="sum").backward()
            change = {n: (p.detach() * p.grad).double() for n, p in parameters.items() if p.grad is not None}
            for name, expected in units.sums(change, ("consumer",)).items():
                total[name] += expected**2
        network.zero_grad(set_to_none=True)
        return {name: value / len(images) for name, value in total.items()}
