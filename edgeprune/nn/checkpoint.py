"""The state of a training after each epoch, in one file that is whole or absent."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

# What torch.load and load_state_dict raise on a file that is cut short or of another kind.
BROKEN = (OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError, pickle.UnpicklingError)


@dataclass(frozen=True)
class Checkpoint:
    """A file, and the key of the training that it must belong to."""

    path: Path
    key: str

    def save(self, module: nn.Module, optimizer: torch.optim.Optimizer, losses: Sequence[float]) -> None:
        """Write the state after `len(losses)` epochs over the one before."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "key": self.key,
            "losses": list(losses),
            "module": module.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        temporary = self.path.with_name(self.path.name + ".tmp")
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)

    def restore(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
        """Put the saved state back and give the loss of each epoch done; [] without one of this training."""
        try:
            state = torch.load(self.path, weights_only=True)
            if state["key"] != self.key:
                return []
            # The optimizer first: if it is refused, the network is still as it was.
            optimizer.load_state_dict(state["optimizer"])
            module.load_state_dict(state["module"])
            return [float(loss) for loss in state["losses"]]
        except BROKEN:
            # Training starts again then, and ends the same.
            return []


def key(settings: str, networks: Sequence[nn.Module]) -> str:
    """A hash of the settings and of all weights that a training starts from."""
    digest = hashlib.sha256(settings.encode())
    for network in networks:
        for name, tensor in network.state_dict().items():
            digest.update(name.encode())
            if isinstance(tensor, Tensor):
                digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
