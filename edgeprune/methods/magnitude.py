"""Keep the channels whose coupled weights are largest (group L2 norm); needs no data.

Li et al., "Pruning Filters for Efficient ConvNets" (2017), with the norm taken over every weight that a channel
owns in its group, makers and readers alike (Fang et al., "DepGraph", 2023). Scores are divided by their group's
mean, so that groups of unlike width and scale can be compared.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgeprune.methods import PruneTask, ScoreMethod
from edgeprune.nn.units import channel_sums


@dataclass(frozen=True)
class Magnitude(ScoreMethod):
    """Group L2 norm."""

    def scores(self, network: nn.Module, task: PruneTask) -> dict[str, Tensor]:
        """sqrt of the sum of squares over each channel's weights, relative to the group's mean."""
        squares = {name: p.detach().double() ** 2 for name, p in network.named_parameters() if p.ndim > 1}
        out = {}
        for group in task.groups:
            norm = channel_sums(group, squares, ("producer", "norm", "consumer")).sqrt()
            out[group.name] = norm / torch.clamp(norm.mean(), min=1e-30)
        return out
