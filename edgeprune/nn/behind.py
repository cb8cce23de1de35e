"""What stands behind a layer that is solved: its batch-norm, a sum with a shortcut, an activation that cuts off."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from edgeprune.nn.least_squares import CutOff
from edgeprune.nn.tracing import Call, Program

# A batch-norm that hardly scales an output can't pass a correction on.
FAINT = 1e-3
# Constant below 0. What they do to large values is left out of account.
_RECTIFIERS = frozenset(("relu", "relu6"))


@dataclass(frozen=True)
class Behind:
    """norm: the batch-norm call that alone reads the layer. total: the sum that alone reads that.

    axis: the dimension of the layer's output that its outputs are in. shortcut: the name of the other value in the sum.
    rectified: whether only an activation that is 0 below 0 reads the result.
    """

    axis: int
    norm: Call | None
    total: Call | None
    shortcut: str
    rectified: bool


def behind(program: Program, call: Call) -> Behind:
    """What stands behind a layer's call, as far as nothing else reads what is between."""
    end, norm, total, shortcut = call, None, None, ""
    axis = len(call.shape) - 1 if call.op == "linear" else 1
    follower = _only_user(program, end)
    if follower is not None and follower.op == "batch_norm" and axis == 1 and _is_fixed(follower):
        end, norm = follower, follower
        follower = _only_user(program, end)
    plain = follower is not None and follower.op == "add" and len(follower.reads) == 2
    if follower is not None and plain and follower.arg("alpha") == 1 and follower.shape == call.shape:
        total, shortcut = follower, follower.reads[1 - follower.reads.index(end.name)]
        follower = _only_user(program, total)
    return Behind(axis, norm, total, shortcut, follower is not None and follower.op in _RECTIFIERS)


def scale_of(norm: Call | None, state: Mapping[str, Tensor], outputs: int) -> tuple[Tensor, Tensor]:
    """What a batch-norm multiplies each output with (1 without one), and where that is next to nothing: (O,) each."""
    if norm is None:
        return torch.ones(outputs), torch.zeros(outputs, dtype=torch.bool)
    weight, variance = norm.arg("weight"), norm.arg("running_var")
    scale = (state[variance.name].double() + norm.arg("eps")).rsqrt()
    if weight is not None:
        scale = scale * state[weight.name].detach().double()
    faint = scale.abs() <= FAINT * scale.abs().max()
    return torch.where(faint, 1.0, scale).float(), faint


def lacking(found: Behind, state: Mapping[str, Tensor], dense: Tensor, small: Tensor) -> Tensor:
    """What the layer should answer besides, so that the sum is the dense one.

    Args:
        state: of the cut network. dense, small: the shortcut's value in either network, (N, O, ...).
    """
    scale, faint = scale_of(found.norm, state, small.shape[found.axis])
    gain = torch.where(faint, 0.0, 1 / scale)
    return (dense - small) * _along(gain, small.ndim, found.axis)


def cut_off(
    found: Behind, state: Mapping[str, Tensor], level: Tensor, shortcut: Tensor | None, ndim: int
) -> CutOff | None:
    """Which answers of the layer the activation behind cuts off; None when there is none.

    Args:
        state: of the cut network. level: (O,), what the batch-norm takes off the answer. shortcut: the other value of
            the sum in the cut network, (N, O, ...). ndim: of the layer's output.

    Returns:
        `at` has the shape of the layer's output, or 1 in the place of N and the positions.
    """
    if not found.rectified or (found.total is not None and shortcut is None):
        return None
    scale, faint = scale_of(found.norm, state, len(level))
    shift = found.norm.arg("bias") if found.norm is not None else None
    bias = state[shift.name].detach() if shift is not None else torch.zeros(len(level))
    at = _along(level.float() - bias / scale, ndim, found.axis)
    if shortcut is not None:
        at = at - shortcut / _along(scale, ndim, found.axis)
    return CutOff(at, torch.where(faint, 0.0, scale.sign()))


def _is_fixed(norm: Call) -> bool:
    """Whether a batch-norm scales with what it remembers, and not with the statistics of the batch."""
    return norm.arg("running_mean") is not None and not norm.arg("training")


def _along(values: Tensor, ndim: int, axis: int) -> Tensor:
    return values.view(*(-1 if i == axis else 1 for i in range(ndim)))


def _only_user(program: Program, call: Call) -> Call | None:
    users = program.users(call.name)
    return users[0] if len(users) == 1 and call.name != program.output else None
