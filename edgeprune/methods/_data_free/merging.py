"""Remove units by editing weights: merge a unit into another one, or put its mean into a bias.

Works in place on the bare network; afterwards the unit is zeroed and can be cut. A merge (Meng et al.; Srinivas and
Babu 2015) adds the outgoing weights of `remove` to those of `keep`. Where units are not interchangeable (residual sums,
depthwise filters), the mean contribution of a unit goes into the next layer's bias or its batch-norm's mean, as Ye, Lu,
Lin and Wang do with constant channels ("Rethinking the Smaller-Norm-Less-Informative Assumption in Channel Pruning of
Convolution Layers", 2018).
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgeprune import models
from edgeprune.errors import EdgepruneError, UnsupportedModel
from edgeprune.methods._data_free.pairing import Pair
from edgeprune.models import Program
from edgeprune.records import Group, Member
from edgeprune.structure import Path, follow, following_batch_norm

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True, eq=False)
class Rows:
    """The weights of each unit of a group, batch-norm folded in: pre-activation = incoming . patch + bias.

    incoming: float64 (C, F). bias: float64 (C,). outgoing: (C, G), all weights that read the unit, in the network's own
    precision (a classifier after a flatten has 10^8 of them).
    """

    incoming: Tensor
    bias: Tensor
    outgoing: Tensor


def why_not_mergeable(program: Program, network: nn.Module, group: Group) -> str | None:
    """Why no unit of a group can replace another one by weights alone, or None when it can.

    Merging needs one ungrouped convolution or linear layer that makes the units, at most a batch-norm right after it,
    and between that and every reader only operators that treat all channels alike.
    """
    tied = _tied(group)
    if tied is not None:
        return tied
    path = follow(program, group)
    if isinstance(path, str):
        return path
    modules = dict(network.named_modules())
    slopes = {n: m.weight for n in _layers(group, "norm") if isinstance(m := modules.get(n), nn.PReLU)}
    uneven = [n for n, slope in slopes.items() if bool(slope.max() != slope.min())]
    return f"{uneven[0]} has another slope for each of its channels" if uneven else None


def is_homogeneous(program: Program, group: Group) -> bool:
    """Whether c > 0 times the pre-activation of a unit gives c times the input of all its readers.

    Then a unit that is a multiple of another one is merged exactly. False for a group that can't be merged.
    """
    if _tied(group) is not None:
        return False
    path = follow(program, group)
    return isinstance(path, Path) and path.homogeneous


def unit_rows(network: nn.Module, group: Group) -> Rows:
    """Incoming rows, biases and outgoing weights of the units of a group that has one producer."""
    tied = _tied(group)
    if tied is not None:
        raise UnsupportedModel(f"the units of {group.name} are no rows of one layer: {tied}")
    state = models.tensors(network)
    made = {m.tensor: m for m in group.members if m.role == "producer"}
    weight = next(m for m in made.values() if m.tensor.endswith("weight"))
    incoming = _by_unit(state[weight.tensor], weight).double()
    constant = made.get(weight.tensor.removesuffix("weight") + "bias")
    bias = torch.zeros(group.channels, dtype=torch.float64)
    if constant is not None:
        bias = _by_unit(state[constant.tensor], constant)[:, 0].double()
    for member in group.members:
        if member.role == "norm" and member.tensor.endswith("running_mean"):
            norm: Any = network.get_submodule(_path(member.tensor))
            own = models.tensors(norm)
            own = {name: _by_unit(t, member)[:, 0].double() for name, t in own.items() if t.ndim == 1}
            scale, shift = models.affine(
                own["running_mean"], own["running_var"], own.get("weight"), own.get("bias"), norm.eps
            )
            incoming, bias = incoming * scale[:, None], bias * scale + shift
    outgoing = [_by_unit(state[m.tensor], m) for m in group.members if m.role == "consumer"]
    return Rows(incoming, bias, outgoing[0] if len(outgoing) == 1 else torch.cat(outgoing, 1))


def merge(network: nn.Module, group: Group, pairs: Sequence[Pair]) -> None:
    """Merge `remove` of each pair into `keep`, in place: w_keep += scale w_remove, then `remove` is zeroed.

    Exact for equal rows, and for multiples of each other when the path to the readers is homogeneous.
    """
    used = Counter(u for pair in pairs for u in (pair.keep, pair.remove))
    wrong = next((u for u, times in used.items() if times > 1 or not 0 <= u < group.channels), None)
    if wrong is not None:
        raise EdgepruneError(
            f"unit {wrong} of {group.name} is in {used[wrong]} pairs, "
            f"accepted: each of units 0 to {group.channels - 1} in one"
        )
    if not pairs:
        return
    state = models.tensors(network)
    with torch.no_grad():
        for member in group.members:
            if member.role != "consumer":
                continue
            weight = state[member.tensor].movedim(member.axis, 0)
            keep = torch.tensor([p for pair in pairs for p in member.positions[pair.keep]])
            gone = torch.tensor([p for pair in pairs for p in member.positions[pair.remove]])
            scale = [pair.scale for pair in pairs for _ in member.positions[pair.keep]]
            shape = (-1, *[1] * (weight.ndim - 1))
            added = weight[gone].double() * torch.tensor(scale, dtype=torch.float64).view(shape)
            weight[keep] = (weight[keep].double() + added).to(weight.dtype)
    _zero(network, group, [pair.remove for pair in pairs])


def compensate(
    program: Program, network: nn.Module, group: Group, removed: Sequence[int], means: Mapping[str, Tensor]
) -> None:
    """Zero units, in place, and add their mean contribution to the biases of the layers that read them.

    The contribution is mean * w summed over a convolution's taps, as in the interior of an image. Without a bias it is
    subtracted from the running mean of the batch-norm right after the reader; without either it is lost. For any group
    that can be cut.

    Args:
        means: reader's path -> (channels of its input,), the mean of each.
    """
    readers = [m for m in group.members if m.role == "consumer"]
    lost = {_path(m.tensor): _contribution(network, m, removed, means) for m in readers}
    for layer, value in lost.items():
        _absorb(program, network, layer, value)
    _zero(network, group, removed)


def _tied(group: Group) -> str | None:
    producers = _layers(group, "producer")
    if len(producers) != 1:
        return f"its units are joined from what {len(producers)} layers make ({', '.join(producers[:3])})"
    if {len(p) for m in group.members if m.role == "producer" for p in m.positions} != {1}:
        return "its channels go in sets, which a grouped convolution, a split or a group norm ties together"
    if any(len({len(p) for p in m.positions}) != 1 for m in group.members):
        return "its units do not all have the same number of readers"
    return None


def _path(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def _layers(group: Group, role: str) -> list[str]:
    """The paths of the layers that have tensors of a role; a parameter of the network itself is its own name."""
    return list(dict.fromkeys(_path(m.tensor) or m.tensor for m in group.members if m.role == role))


def _by_unit(tensor: Tensor, member: Member) -> Tensor:
    places = torch.tensor(member.positions)
    return tensor.detach().movedim(member.axis, 0)[places.flatten()].reshape(len(places), -1)


def _zero(network: nn.Module, group: Group, removed: Sequence[int]) -> None:
    keep = torch.ones(group.channels, dtype=torch.bool)
    keep[list(removed)] = False
    models.mask(network, (group,), {group.name: keep})


def _contribution(
    network: nn.Module, member: Member, removed: Sequence[int], means: Mapping[str, Tensor]
) -> Tensor:
    """The mean contribution of the removed units to a layer's outputs, float64 (outputs,)."""
    name = _path(member.tensor)
    layer = network.get_submodule(name)
    weight = layer.get_parameter("weight").detach().double()
    if isinstance(layer, _TRANSPOSED):
        # Each output meets one tap in `stride` along every axis.
        taps = weight.flatten(2).sum(2).T / math.prod(layer.stride)
    else:
        taps = weight.flatten(2).sum(2) if weight.ndim > 2 else weight
    sets = int(getattr(layer, "groups", 1))
    width = taps.shape[1]
    given = means.get(name)
    if given is None or given.shape != (sets * width,):
        shape = "none" if given is None else str(tuple(given.shape))
        raise EdgepruneError(f"means ({sets * width},) are needed for the input of {name}, got {shape}")
    gone = torch.zeros((sets, width), dtype=torch.float64)
    places = [place for unit in removed for place in member.positions[unit]]
    gone[:, places] = given.detach().double().view(sets, width)[:, places]
    return torch.einsum("goi,gi->go", taps.reshape(sets, -1, width), gone).flatten()


def _absorb(program: Program, network: nn.Module, layer: str, value: Tensor) -> None:
    bias = models.tensors(network.get_submodule(layer)).get("bias")
    if bias is not None:
        bias.data.copy_(bias.data.double() + value)
    elif norm := following_batch_norm(program, layer):
        running_mean = network.get_submodule(norm).get_buffer("running_mean")
        running_mean.copy_(running_mean.double() - value)
