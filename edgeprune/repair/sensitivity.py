"""The measured loss of thinning each group, after a cheap correction of what follows.

Every group is thinned alone, in its elimination order, to a few widths. Without labels its readers are solved in
closed form on the dense network's moments, and the divergence of the outputs is measured (`losses`); with labels
batch-norm uses the statistics of the thinned network, and the rise of the loss is measured (`Renormalized`). Between
those widths the loss is interpolated along the order's own error.
"""

import math
from collections.abc import Callable, Mapping, Sequence, Set
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeprune.models import Program, logits, tensors
from edgeprune.progress import track
from edgeprune.records import Group
from edgeprune.repair.backward_elimination import Order
from edgeprune.repair.consumers import Consumer, bias_of, solve
from edgeprune.repair.input_moments import positions
from edgeprune.train import normalizers

# Multiply-accumulates of the whole measurement, and what they are spent on.
WORK = 1.5e12
MOST_IMAGES, LEAST_IMAGES = 128, 8
MOST_WIDTHS, LEAST_WIDTHS = 7, 2
RIDGE = 1e-3
# Divergences above this, in nats, and NaN all count as this: the network is useless.
WORST = 1e3


@dataclass(frozen=True)
class SensitivityProbe:
    """network: images to logits; changed during the measurement, and restored. bare: its traced part.

    moments: path of a reader -> float64 (F + 1, F + 1), where they are known.
    """

    network: nn.Module
    bare: nn.Module
    program: Program
    moments: Mapping[str, Tensor]


def divergence(dense: Tensor, other: Tensor) -> float:
    """Mean Kullback-Leibler divergence of the class probabilities, in nats; infinite where it is not a number.

    Args:
        dense, other: logits (N, K); a single one is for one class against another whose logit is 0.
    """
    if dense.shape[1] == 1:
        dense, other = (torch.cat([outputs, torch.zeros_like(outputs)], 1) for outputs in (dense, other))
    first, second = (functional.log_softmax(outputs.double(), 1) for outputs in (dense, other))
    found = float((first.exp() * (first - second)).sum(1).mean())
    return max(0.0, found) if math.isfinite(found) else math.inf


def losses(
    probe: SensitivityProbe,
    groups: Sequence[Group],
    orders: Mapping[str, Order],
    readers: Mapping[str, Sequence[Consumer]],
    images: Tensor,
    macs: float,
) -> dict[str, Tensor]:
    """Divergence of the outputs for every group and number of units kept.

    Returns:
        group -> float64 (C + 1,), not increasing in the count; infinite for 0 and 0 for all.
    """
    count, widths = effort(len(groups), macs)
    used = images[positions(len(images), count)]
    with torch.no_grad():
        dense = logits(probe.network, used)
    found = {}
    for group in track(groups, len(groups), "measure thinned layers"):
        order = orders[group.name]
        knots = {group.channels: 0.0}
        for kept in _tried(group.channels, widths):
            gone = order.units[: group.channels - kept]
            with _Thinned(probe, group, readers[group.name], gone), torch.no_grad():
                knots[kept] = min(WORST, divergence(dense, logits(probe.network, used)))
        found[group.name] = curve(order, knots)
    return found


class Renormalized:
    """The rise of the loss when groups are thinned and batch-norm uses the resulting statistics.

    So it measures the units removed, not the wrong scale of the layers that follow, which training corrects at once.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: Callable[[nn.Module], float],
        groups: Sequence[Group],
        orders: Mapping[str, Order],
    ) -> None:
        self._copy, self._loss, self._groups, self._orders = deepcopy(network).eval(), loss, groups, orders
        for layer in normalizers(self._copy):
            # Without them it takes those of the batch, whatever mode it is put in.
            layer.running_mean = layer.running_var = None  # type: ignore[assignment]
        self._tensors = tensors(self._copy)
        self._known: dict[tuple[int, ...], float] = {}
        with torch.no_grad():
            self._dense = loss(self._copy)

    def rise(self, kept: Mapping[str, int]) -> float:
        """The rise of the loss with so many units per group, all at once; missing groups keep all."""
        counts = tuple(kept.get(g.name, g.channels) for g in self._groups)
        if counts not in self._known:
            before = []
            for group, count in zip(self._groups, counts, strict=True):
                gone = self._orders[group.name].units[: group.channels - count]
                if gone:
                    before += _without(self._tensors, group, gone)
            with torch.no_grad():
                rise = self._loss(self._copy) - self._dense
                for tensor, values in reversed(before):
                    tensor.copy_(values)
            self._known[counts] = min(WORST, rise) if math.isfinite(rise) else WORST
        return self._known[counts]

    def losses(self, widths: int) -> dict[str, Tensor]:
        """As `losses`: each group thinned alone, to so many widths."""
        found = {}
        for group in track(self._groups, len(self._groups), "measure thinned layers"):
            tried = _tried(group.channels, widths)
            knots = {kept: self.rise({group.name: kept}) for kept in tried}
            found[group.name] = curve(self._orders[group.name], {group.channels: 0.0, **knots})
        return found


def _tried(channels: int, widths: int) -> list[int]:
    shares = (1 - share / (widths + 1) for share in range(1, widths + 1))
    return [k for k in dict.fromkeys(max(1, round(channels * share)) for share in shares) if k < channels]


def effort(groups: int, macs: float, work: float = WORK, most: int = MOST_IMAGES) -> tuple[int, int]:
    """How many images, and widths of each group, that many multiply-accumulates allow."""
    share = work / (max(1, groups) * macs)
    images = int(min(most, max(LEAST_IMAGES, share / MOST_WIDTHS)))
    return images, int(min(MOST_WIDTHS, max(LEAST_WIDTHS, share / images)))


def curve(order: Order, knots: Mapping[int, float]) -> Tensor:
    """Losses at every count from those at a few, along the elimination's error."""
    channels = len(order.units) + 1
    errors = order.errors
    at = sorted((errors[channels - kept], value) for kept, value in knots.items())
    xs, ys = (
        [x for x, _ in at],
        torch.tensor([y for _, y in at], dtype=torch.float64).cummax(0).values.tolist(),
    )
    out = torch.full((channels + 1,), float("inf"), dtype=torch.float64)
    out[channels] = 0
    for kept in range(1, channels):
        out[kept] = _between(xs, ys, errors[channels - kept])
    return out


def _between(xs: list[float], ys: list[float], x: float) -> float:
    if x >= xs[-1]:
        return ys[-1] * x / xs[-1] if xs[-1] > 0 else ys[-1]
    right = next(i for i, knot in enumerate(xs) if knot > x)
    if right == 0:
        return ys[0]
    share = (x - xs[right - 1]) / (xs[right] - xs[right - 1])
    return ys[right - 1] + share * (ys[right] - ys[right - 1])


class _Thinned:
    """A context in which a group's readers lack some units, solved again where their moments are known."""

    def __init__(
        self, probe: SensitivityProbe, group: Group, readers: Sequence[Consumer], gone: Sequence[int]
    ) -> None:
        self._probe, self._group, self._gone = probe, group, gone
        self._readers = [reader for reader in readers if reader.path in probe.moments]
        self._before: list[tuple[Tensor, Tensor]] = []

    def __enter__(self) -> None:
        for reader in self._readers:
            self._thin(reader)
        # The others only lose the units: grouped and transposed convolutions, very wide layers.
        solved = {f"{reader.path}.weight" for reader in self._readers}
        self._before += _without(tensors(self._probe.bare), self._group, self._gone, solved)

    def __exit__(self, *_: object) -> None:
        with torch.no_grad():
            for tensor, before in reversed(self._before):
                tensor.copy_(before)

    def _thin(self, reader: Consumer) -> None:
        weight = reader.layer.get_parameter("weight")
        lost = [f for unit in self._gone for f in reader.features[unit]]
        self._remember(weight)
        moments = self._probe.moments[reader.path]
        bias = bias_of(self._probe.program, self._probe.bare, reader.path)
        for tensor in (bias.bias, bias.running_mean):
            if tensor is not None:
                self._remember(tensor)
        start = torch.cat([weight.detach().flatten(1).T.double(), torch.zeros(1, len(weight)).double()])
        keep = sorted(set(range(len(start) - 1)).difference(lost))
        solved = solve(moments, moments @ start, start, keep, constant=bias.free, ridge=RIDGE)
        with torch.no_grad():
            weight.copy_(solved[:-1].T.reshape(weight.shape).to(weight.dtype))
        bias.add(solved[-1])

    def _remember(self, tensor: Tensor) -> None:
        self._before.append((tensor, tensor.detach().clone()))


def _without(
    tensors: Mapping[str, Tensor], group: Group, gone: Sequence[int], but: Set[str] = frozenset()
) -> list[tuple[Tensor, Tensor]]:
    """Zero some units in the readers of a group, `but` some tensors: each tensor, and its former values."""
    before = []
    for member in group.members:
        if member.role == "consumer" and member.tensor not in but:
            tensor = tensors[member.tensor]
            before.append((tensor, tensor.detach().clone()))
            lost = sorted({p for unit in gone for p in member.positions[unit]})
            with torch.no_grad():
                tensor.index_fill_(member.axis, torch.tensor(lost, dtype=torch.int64), 0)
    return before
