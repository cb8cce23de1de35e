"""Keep the channels whose coupled weights are largest (group L2 norm), or the largest weights; needs no data.

Li et al., "Pruning Filters for Efficient ConvNets" (2017), with the norm taken over every weight that a channel
owns in its group, makers and readers alike (Fang et al., "DepGraph", 2023). The score is the square of that norm as a
share of the group's sum, so that it says how much of a group goes, whatever its width and scale. Of single weights
the score is |w| (Han et al., "Learning both Weights and Connections", 2015), over all layers together.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from edgeprune.methods._base import PruneTask, ScoreMethod, group_shares
from edgeprune.structure import channel_sums


@dataclass(frozen=True)
class Magnitude(ScoreMethod):
    """Group L2 norm, or |w|."""

    def scores(self, network: nn.Module, task: PruneTask) -> dict[str, Tensor]:
        """Share of its group's sum of squares that each channel owns, adding up to 1; |w| of single weights."""
        if task.weights is not None:
            return task.weights.norms(network)
        squares = {name: p.detach().double() ** 2 for name, p in network.named_parameters() if p.ndim > 1}
        roles = ("producer", "norm", "consumer")
        return group_shares({g.name: channel_sums(g, squares, roles) for g in task.groups})
