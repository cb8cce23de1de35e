"""New weights for a network, drawn by a seed as its layers draw them."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import nn

from edgeprune.errors import UsageError


def renew(network: nn.Module, seed: int) -> tuple[str, ...]:
    """New weights by the seed, drawn on the CPU, so that every device gets the same; notes of what could not be drawn.

    Raises:
        UsageError: no layer can be initialized.
    """
    fresh, known = deepcopy(network).cpu(), set[str]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for path, layer in fresh.named_modules():
            reset = getattr(layer, "reset_parameters", None)
            if callable(reset):
                reset()
                known |= {
                    f"{path}.{name}" if path else name for name, _ in layer.named_parameters(recurse=False)
                }
    if not known:
        raise UsageError("no layer of the network can be initialized anew", "train from the given weights")
    network.load_state_dict(fresh.state_dict())
    old = [name for name, _ in network.named_parameters() if name not in known]
    return (f"Not initialized anew, because it is no layer's: {', '.join(old)}.",) if old else ()
