"""What share of the dense network's weights and parameters is left and not zero, and in which layers."""

import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgeprune.errors import UsageError
from edgeprune.models import LAYERS, total_params
from edgeprune.onnx_graph import data_files
from edgeprune.records import METRICS, Reading

COUNTED = "counted"
LEVEL = 9
_CHUNK = 2**20


def size(path: Path, *, name: str = "") -> Reading:
    """The bytes of a file, and of those beside it that hold its numbers."""
    try:
        value, beside = path.stat().st_size, data_files(path)
        value += sum(file.stat().st_size for file in beside.values())
    except OSError as error:
        raise UsageError(f"the size of {path} can't be had: {error}") from error
    return Reading("size", float(value), "B", 1, None, COUNTED, name or path.name, _files(path, beside))


def compressed_size(path: Path, *, name: str = "") -> Reading:
    """The bytes of the same after deflate at its highest level (a zlib stream), as a download or an archive has it."""
    packer, value = zlib.compressobj(LEVEL), 0
    try:
        beside = data_files(path)
        for part in (path, *beside.values()):
            with part.open("rb") as file:
                while chunk := file.read(_CHUNK):
                    value += len(packer.compress(chunk))
    except OSError as error:
        raise UsageError(f"the compressed size of {path} can't be had: {error}") from error
    value += len(packer.flush())
    conditions = {**_files(path, beside), "compression": f"deflate level {LEVEL} (zlib)"}
    return Reading("compressed_size", float(value), "B", 1, None, COUNTED, name or path.name, conditions)


def _files(path: Path, beside: Mapping[str, Path]) -> dict[str, Any]:
    return {"file": path.name, **({"data_files": list(beside)} if beside else {})}


def densities(networks: Mapping[str, nn.Module]) -> dict[str, tuple[Reading, ...]]:
    """How much of the dense network is left and not zero, of its weights and of all its parameters.

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
    found = {id(layer.weight): layer.weight for layer in network.modules() if isinstance(layer, LAYERS)}
    yield from found.values()
