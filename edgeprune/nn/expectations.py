"""What activations are on average, by what batch-norm remembers: means per channel without any data.

A batch-norm layer in evaluation mode puts out channels of mean `bias` and deviation `weight`, whatever feeds it. Taken
as Gaussian, they go through activations by quadrature and through sums by adding up. Estimates, not bounds: they say
what to leave behind for a unit that goes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from edgeprune.nn.tracing import Call, Program

_NODES = 33
# They act on every entry alone and alike, so a Gaussian's mean and variance after them is an integral.
_POINTWISE = frozenset((
    "relu", "relu6", "hardtanh", "clamp", "clamp_min", "leaky_relu", "elu", "selu", "celu", "sigmoid", "hardsigmoid",
    "tanh", "silu", "hardswish", "gelu", "mish", "softplus",
))  # fmt: skip
_SAME = frozenset(("dropout", "clone", "contiguous", "alias", "detach", "_to_copy"))
_POOLS = frozenset(("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "mean", "max_pool2d_with_indices"))
_RESHAPES = frozenset(("flatten", "view", "reshape", "_unsafe_view"))


@dataclass(frozen=True)
class Moments:
    """mean, variance: float64 (C,), of a channel's entries over images and positions."""

    mean: Tensor
    variance: Tensor


def expectations(program: Program, state: Mapping[str, Tensor]) -> dict[str, Moments]:
    """Mean and variance of every value for which the batch-norms before it say them.

    Args:
        program: the traced network. state: its tensors by state-dict name.

    Returns:
        Name of a call -> moments of its output's channels; calls that nothing is known of are absent.
    """
    found: dict[str, Moments] = {}
    for call in program.calls:
        moments = _batch_norm(call, state) if call.op == "batch_norm" else _behind(call, found)
        if moments is not None:
            found[call.name] = moments
    return found


def _batch_norm(call: Call, state: Mapping[str, Tensor]) -> Moments | None:
    weight, bias, mean = (call.arg(n) for n in ("weight", "bias", "running_mean"))
    if mean is None or call.arg("training"):
        return None
    like = state[mean.name].double()
    deviation = state[weight.name].detach().double() if weight is not None else torch.ones_like(like)
    return Moments(
        state[bias.name].detach().double() if bias is not None else torch.zeros_like(like), deviation**2
    )


def _behind(call: Call, found: Mapping[str, Moments]) -> Moments | None:
    known = [found.get(name) for name in call.reads]
    if not known or any(m is None for m in known):
        return None
    moments = [m for m in known if m is not None]
    first = moments[0]
    if call.op in _POINTWISE and len(moments) == 1:
        return _integral(call, first)
    if call.op in _SAME or (call.op in _POOLS and _keeps_channels(call)):
        return first
    if call.op in _RESHAPES and len(call.shape) == 2 and call.shape[1] % len(first.mean) == 0:
        times = call.shape[1] // len(first.mean)
        return Moments(first.mean.repeat_interleave(times), first.variance.repeat_interleave(times))
    if call.op == "add" and len(moments) == 2 and call.arg("alpha") == 1:
        other = moments[1]
        if len(first.mean) == len(other.mean):
            return Moments(first.mean + other.mean, first.variance + other.variance)
    if call.op == "cat" and call.args[1] in (1, -len(call.shape) + 1):
        return Moments(torch.cat([m.mean for m in moments]), torch.cat([m.variance for m in moments]))
    return None


def _keeps_channels(call: Call) -> bool:
    """Whether a mean is over positions; other pools are by their nature."""
    if call.op != "mean":
        return True
    dims = call.arg("dim") if "dim" in call.names else None
    rank = len(call.shape) if not dims or call.arg("keepdim") else len(call.shape) + len(dims)
    return bool(dims) and all(d % rank > 1 for d in dims)


def _integral(call: Call, x: Moments) -> Moments:
    """Mean and variance of f(x) for Gaussian x, by Gauss-Hermite quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(_NODES)
    z = torch.from_numpy(nodes).view(-1, 1)
    w = torch.from_numpy(weights / weights.sum()).view(-1, 1)
    values = call.run((x.mean + x.variance.sqrt() * z, *call.args[1:]))
    mean = (w * values).sum(0)
    return Moments(mean, (w * (values - mean) ** 2).sum(0))
