"""Keep the units whose removal would change the loss most, by a first-order expansion; needs labelled images.

Molchanov et al., "Importance Estimation for Neural Network Pruning" (2019), Eq. 8, with one gate where the group's
readers take the channel in: setting channel i to zero changes the loss of a batch by about -sum(w * dL/dw) over the
weights that read it, whatever batch-norm, activation or residual sum stands between. The score is the mean square of
that change over small batches: of its mean square, its root and its mean absolute value, the square shares a budget
out best over layers (in our trials on a ResNet-20).

Scores of single channels do not say what many of them are worth together. In a network with batch-norm it is measured:
each group is thinned alone to a few widths, and the rise of the loss is what its channels cost there.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeprune import repair
from edgeprune.errors import UsageError, not_short
from edgeprune.methods._base import PruneTask, ScoreMethod, Survey, need_images
from edgeprune.models import FORWARD_ERRORS
from edgeprune.progress import track
from edgeprune.repair import Order, positions
from edgeprune.structure import losses_of
from edgeprune.train import normalizers

# Images to measure the loss of thinned layers on; with fewer than the second number the scores are more accurate.
MOST, LEAST = 512, 16
# Most joint measurements of all layers.
TRIES = 60
# Pixels of one channel in one batch, which has to fit in memory.
PIXELS = 2**22
# Multiply-accumulates of a forward and a backward pass, over those of a forward pass.
PASSES = 3


@dataclass(frozen=True)
class Taylor(ScoreMethod):
    """First-order change of the loss.

    images: how many to use; batch: images per expansion. measured: allocate channels by the measured loss of thinned
    layers instead of the scores alone.
    """

    images: int = 1024
    batch: int = 32
    measured: bool = True

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

    def weigh(self, network: nn.Module, task: PruneTask, scores: Mapping[str, Tensor]) -> Survey:
        """Measured where possible: with batch-norm, on enough images."""
        images, labels = need_images("taylor", task)
        macs = task.costs.cost({})["macs"]
        work = max(repair.WORK, PASSES * self.images * macs)
        count, widths = repair.effort(len(task.groups), macs, work, MOST)
        count = min(count, len(images), max(LEAST, PIXELS // images[0, 0].numel()))
        by_scores = Survey(losses_of(scores), scores)
        if not self.measured or task.rules.cuts is not None or count < LEAST or not normalizers(network):
            return by_scores
        rows = positions(len(images), count)
        x, y = images[rows], labels[rows]

        def loss(other: nn.Module) -> float:
            return float(functional.cross_entropy(task.logits(other, x), y))

        orders = {group: _order(values) for group, values in scores.items()}
        try:
            thinned = repair.Renormalized(network, loss, task.groups, orders)
            tries = min(TRIES, int(work / (count * macs)))
            return Survey(thinned.losses(widths), scores, thinned.rise, tries)
        except FORWARD_ERRORS as error:
            not_short()
            task.notes.append(f"Channels were allocated by their scores, not by the measured loss: {error}.")
            return by_scores


def _order(scores: Tensor) -> Order:
    """The smallest score first; the error is the sum of the scores removed."""
    units = torch.argsort(scores, descending=True, stable=True).flip(0)
    gone = scores[units].clamp(min=0).cumsum(0)
    return Order(tuple(units.tolist()[:-1]), (0.0, *gone.tolist()[:-1]))
