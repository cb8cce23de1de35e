"""Keep channels or weights drawn at random: the baseline that every other method must beat; needs no data."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgeprune.methods._base import PruneTask, ScoreMethod, group_shares


@dataclass(frozen=True)
class UniformRandom(ScoreMethod):
    """Uniformly random scores, the same for the same seed."""

    def scores(self, network: nn.Module, task: PruneTask) -> dict[str, Tensor]:
        """Independent draws; of channels as shares of their group's sum."""
        generator = torch.Generator().manual_seed(task.seed)
        draws = {
            name: torch.rand(n, generator=generator, dtype=torch.float64)
            for name, n in task.units.sizes.items()
        }
        return draws if task.weights is not None else group_shares(draws)
