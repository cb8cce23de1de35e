"""What share of the dense network's weights and parameters is left and not zero, and in which layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from edgeprune.nn.costs import LAYERS, total_params
from edgeprune.records import METRICS, Reading

COUNTED = "counted"


def densities(networks: Mapping[str, nn.Module]) -> dict[str, tuple[Reading, ...]]:
    """How much of the dense network is left and not zero, of its weights and of all its parameters.

    Args:
        networks: "dense" and others that were made from it.

    Returns:
        Name -> weight_density and param_density: entries that are not zero, over all entries of the dense network.
        Entries of channels that were removed count like zeros; a parameter that two layers share counts once.
    """
    dense = networks["dense"]
    whole = {
        "weight_density": sum(w.numel() for w in _weights(dense)),
        "param_density": sum(p.numel() for p in dense.parameters()),
    }
    return {name: _densities(name, network, whole) for name, network in networks.items()}


def nonzero_weights(network: nn.Module) -> dict[str, int]:
    """Convolution or linear layer -> entries of its weight that are not zero."""
    layers = ((name, layer) for name, layer in network.named_modules() if isinstance(layer, LAYERS))
    return {name: int(torch.count_nonzero(layer.weight)) for name, layer in layers}


def _densities(name: str, network: nn.Module, whole: Mapping[str, int]) -> tuple[Reading, ...]:
    left = {
        "weight_density": sum(int(torch.count_nonzero(w)) for w in _weights(network)),
        "param_density": total_params(network),
    }
    return tuple(
        Reading(
            metric, count / whole[metric] if whole[metric] else None, METRICS[metric].unit, 1, None, COUNTED, name,
            {"nonzero": count, "of": whole[metric], **({} if whole[metric] else {"why": "there are none"})},
        )
        for metric, count in left.items()
    )  # fmt: skip


def _weights(network: nn.Module) -> Iterator[torch.Tensor]:
    """The weights of convolution and linear layers, each once."""
    found = {id(layer.weight): layer.weight for layer in network.modules() if isinstance(layer, LAYERS)}
    yield from found.values()
