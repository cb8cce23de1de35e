"""Training with weights that stay zero: their gradients, values and momentum are masked at every step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from edgeprune.nn.train import Hooks


def holding(network: nn.Module, stays: Mapping[str, Tensor]) -> Hooks:
    """Hooks that keep entries of a network at zero while it trains.

    Gradients are masked before they are clipped: those of pruned weights would shrink the step of the others.

    Args:
        network: the one that trains. stays: parameter -> bool like it, False is zero and stays zero.
    """

    def mask_gradients() -> None:
        for parameter, keep in _pairs(network, stays):
            if parameter.grad is not None:
                parameter.grad.mul_(keep)

    def mask_weights(optimizer: torch.optim.Optimizer, lr: float) -> None:
        with torch.no_grad():
            for parameter, keep in _pairs(network, stays):
                parameter.mul_(keep)
                for value in optimizer.state.get(parameter, {}).values():
                    if isinstance(value, Tensor) and value.shape == parameter.shape:
                        value.mul_(keep)

    return Hooks(before_step=mask_gradients, after_step=mask_weights)


def _pairs(network: nn.Module, stays: Mapping[str, Tensor]) -> list[tuple[nn.Parameter, Tensor]]:
    named = dict(network.named_parameters(remove_duplicate=False))
    return [(named[name], keep.to(named[name].device)) for name, keep in stays.items()]
