"""The layers that read a group of channels, and where a solved layer's bias can go."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgeprune import models
from edgeprune.models import Program
from edgeprune.records import Group
from edgeprune.repair.input_moments import features, reads_patches
from edgeprune.repair.least_squares import Ridge
from edgeprune.structure import following_batch_norm


@dataclass(frozen=True)
class Consumer:
    """A layer that reads a group. features[u]: the entries of its patches that unit u owns."""

    path: str
    layer: nn.Module
    features: tuple[tuple[int, ...], ...]


def consumers_of(network: nn.Module, group: Group) -> tuple[list[Consumer], list[str]]:
    """The layers that read a group as linear maps of patches, and the paths of the others.

    The others are grouped and transposed convolutions, and readers where units own different numbers of inputs.
    """
    found: list[Consumer] = []
    others: list[str] = []
    for member in group.members:
        if member.role != "consumer":
            continue
        path, _, leaf = member.tensor.rpartition(".")
        layer = network.get_submodule(path)
        owned = {len(p) for p in member.positions}
        if (
            leaf == "weight"
            and member.axis == 1
            and reads_patches(layer)
            and len(owned) == 1
            and owned != {0}
        ):
            found.append(Consumer(path, layer, tuple(tuple(features(layer, p)) for p in member.positions)))
        else:
            others.append(path)
    return found, others


@dataclass(frozen=True)
class Bias:
    """Where a constant of a layer's output is stored: its own bias, or the running mean of the batch-norm after it."""

    bias: Tensor | None
    running_mean: Tensor | None

    @property
    def free(self) -> bool:
        """Whether there is a place for a constant."""
        return self.bias is not None or self.running_mean is not None

    def add(self, shift: Tensor) -> None:
        """Shift the layer's output by (O,), in place."""
        with torch.no_grad():
            if self.bias is not None:
                self.bias.add_(shift.to(self.bias))
            elif self.running_mean is not None:
                self.running_mean.sub_(shift.to(self.running_mean))


def bias_of(program: Program, network: nn.Module, path: str) -> Bias:
    """Where a constant can be added to a layer's output."""
    layer = network.get_submodule(path)
    own = models.tensors(layer).get("bias")
    if own is not None:
        return Bias(own, None)
    norm = _norm_of(program, path)
    statistics = models.tensors(network.get_submodule(norm)) if norm is not None else {}
    return Bias(None, statistics.get("running_mean"))


def _norm_of(program: Program, path: str) -> str | None:
    """The batch-norm after a layer, if it scales the layer's outputs: after sequences it may scale positions."""
    calls = program.readers(f"{path}.weight" if path else "weight")
    if any(call.op == "linear" and len(call.shape) != 2 for call in calls):
        return None
    return following_batch_norm(program, path)


def output_scale(program: Program, network: nn.Module, path: str) -> Tensor:
    """The absolute scale of each output in the batch-norm after a layer: (O,); ones without one."""
    weight = network.get_submodule(path).get_parameter("weight")
    norm = _norm_of(program, path)
    if norm is None:
        return torch.ones(len(weight))
    module: Any = network.get_submodule(norm)
    own = models.tensors(module)
    if "running_var" not in own:
        return torch.ones(len(weight))
    scale, _ = models.affine(own["running_mean"], own["running_var"], own.get("weight"), None, module.eps)
    return scale.detach().abs()


def solve(
    moments: Tensor, cross: Tensor, start: Tensor, keep: Sequence[int] | None, *, constant: bool, ridge: float
) -> Tensor:
    """argmin |X W - Y|^2 + ridge * mean(diag) * |W - start|^2, the constant unpenalized.

    Args:
        moments: X^T X, float64 (F + 1, F + 1), the constant last. cross: X^T Y, (F + 1, O). start: (F + 1, O).
    """
    return Ridge(moments, start, keep, constant=constant, ridge=ridge).solve(cross)
