"""attack, the other side: images that no attack at all can break, by interval bounds; a lower bound of what is so.

S. Gowal et al., On the effectiveness of interval bound propagation for training verifiably robust models, 2018: the
box around an image is followed through the network, and the last linear layer is merged with the differences of the
logits (section 3). Deep networks that were not trained for it keep nothing but the smallest boxes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgeprune import confidence
from edgeprune.bounds import Bounds, Interval, activation_bounds
from edgeprune.data import Split
from edgeprune.errors import UnsupportedModel
from edgeprune.models import Call, Program, Ref, Weight, trace
from edgeprune.records import Reading
from edgeprune.robustness.onnx_module.module import settled
from edgeprune.train import Ball

# Of the attack's radius. Bounds widen from layer to layer, so what they say of the radius itself is mostly nothing.
SHARES = (1.0, 1 / 8, 1 / 64)

METRIC = "certified_accuracy"

HOW = "computed: interval bounds"

# What the bounds of one batch may take: two numbers for every entry of every call's output.
BUDGET_BYTES = 2**29

MOST = 64

# Where none of so many images is proven at the smallest radius, the others are left alone.
ENOUGH = 64

# Letters of a reason that stand in a table.
LONGEST = 160


@dataclass(frozen=True, eq=False)
class _Proof:
    """A network as its traced program, its tensors, and the call that answers."""

    program: Program
    state: Mapping[str, Tensor]
    last: Call

    @property
    def batch(self) -> int:
        """Images at a time."""
        entries = sum(torch.Size(call.shape).numel() for call in self.program.calls)
        return max(1, min(MOST, BUDGET_BYTES // (2 * 4 * max(1, entries))))


def certified(
    network: nn.Module, split: Split, ball: Ball, *, artifact: str, shares: Sequence[float] = SHARES
) -> tuple[Reading, ...]:
    """The share of images that are right, and stay right wherever in a ball an attack could move them.

    The images that a ball of some radius proves are a part of those that a smaller one proves, so each radius is tried
    on what the next smaller one has left.

    Args:
        network: pixels in [0, 1] to logits, in torch. It is what the reading is about, also where a file is attacked.
        split: the images, labelled.
        ball: of the attack. For an L2 ball the box that encloses it is followed.
        artifact: the reading's.
        shares: of the ball's radius, a reading for each.

    Returns:
        "certified_accuracy" for each share, the largest first, with the exact binomial interval. `value` is None, and
        `conditions["why"]` says why, where the network can't be traced or an operator has no bound.
    """
    radii = sorted((share * ball.eps for share in shares), reverse=True)
    try:
        counts = _counts(network, split, radii)
    except UnsupportedModel as error:
        return tuple(
            _reading(None, split, ball.norm, radius, artifact, _short(error.message)) for radius in radii
        )
    return tuple(_reading(counts[radius], split, ball.norm, radius, artifact, "") for radius in radii)


def proven(network: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    """Which images are right and stay so in the whole box of half-width `eps` and in [0, 1]: bool (N,).

    Args:
        network: pixels in [0, 1] to logits. x: float32 (N, C, H, W) in [0, 1]. y: int64 (N,).

    Raises:
        UnsupportedModel: the network can't be traced, or an operator in it has no bound (`Unbounded`).
    """
    return _proven(_opened(network, x), x, y, eps)


def _counts(network: nn.Module, split: Split, radii: Sequence[float]) -> dict[float, int]:
    counts = dict.fromkeys(radii, 0)
    proof = _opened(network, split.take(torch.arange(1)))
    for number, (x, y) in enumerate(split.batches(proof.batch)):
        if number * proof.batch >= ENOUGH and not any(counts.values()):
            break  # what is not looked at is not proven, so the count stays a lower bound
        left, labels = x, y
        for radius in reversed(radii):
            if not len(left):
                break
            stay = _proven(proof, left, labels, radius)
            counts[radius] += int(stay.sum())
            left, labels = left[stay], labels[stay]
    return counts


def _opened(network: nn.Module, x: Tensor) -> _Proof:
    network = settled(network, x[:1])
    program = trace(network, x[:1].cpu())
    state = {name: tensor.detach().cpu() for name, tensor in network.state_dict().items()}
    return _Proof(program, state, program.call(program.output))


def _proven(proof: _Proof, x: Tensor, y: Tensor, eps: float) -> Tensor:
    found: list[Tensor] = []
    for pixels, labels in zip(x.split(proof.batch), y.split(proof.batch), strict=True):
        # One float32 step outward, so that rounding takes nothing off the box.
        low = torch.nextafter((pixels.double() - eps).float(), pixels - 1).clamp_(0, 1)
        high = torch.nextafter((pixels.double() + eps).float(), pixels + 1).clamp_(0, 1)
        bounds = activation_bounds(proof.program, proof.state, Interval(low, high), collapsed=False)
        if proof.last.name in bounds.causes:
            raise bounds.causes[proof.last.name]
        found.append((_least_margins(proof, bounds, labels) > 0).all(1))
    return torch.cat(found)


def _least_margins(proof: _Proof, bounds: Bounds, y: Tensor) -> Tensor:
    """By how much at least the right logit is above each other one: (N, K), inf at the right one; NaN: unknown."""
    linear = _linear(proof)
    if linear is None:
        logits = bounds.intervals[proof.last.name]
        count = len(y)
        low, high = (end.expand(count, -1) for end in (logits.lo, logits.hi))
        margins = low.gather(1, y.unsqueeze(1)) - torch.nextafter(high, high.new_tensor(torch.inf))
    else:
        margins = _merged(bounds.intervals[linear.name], linear, y)
    return margins.scatter(1, y.unsqueeze(1), torch.inf)


@dataclass(frozen=True, eq=False)
class _Linear:
    """A linear layer that answers: the name of what it reads, its weight (K, F) and its bias (K,), in float64."""

    name: str
    weight: Tensor
    bias: Tensor


def _linear(proof: _Proof) -> _Linear | None:
    """The layer that answers, when it is a linear one of features (1, F)."""
    call = proof.last
    if call.op != "linear":
        return None
    given, weight, bias = (call.arg(name) for name in ("input", "weight", "bias"))
    known = isinstance(given, Ref) and isinstance(weight, Weight) and isinstance(bias, (Weight, type(None)))
    if not known or len(proof.program.shape_of(given.name)) != 2:
        return None
    matrix = _tensor(proof, weight)
    return _Linear(
        given.name, matrix, matrix.new_zeros(len(matrix)) if bias is None else _tensor(proof, bias)
    )


def _tensor(proof: _Proof, weight: Weight) -> Tensor:
    held: Any = proof.state if weight.name in proof.state else proof.program.constants
    return held[weight.name].detach().double()


def _merged(features: Interval, linear: _Linear, y: Tensor) -> Tensor:
    """min over the box of (w_y - w_j) . f + b_y - b_j, where f is bounded: (N, K), rounded down."""
    wide = Interval(features.lo.double(), features.hi.double())
    difference = linear.weight[y].unsqueeze(1) - linear.weight
    center, radius = wide.ball(difference.shape[2])
    center, radius = (end.expand(len(y), -1).unsqueeze(2) for end in (center, radius))
    least = (difference @ center - difference.abs() @ radius).squeeze(2)
    shift = linear.bias[y].unsqueeze(1) - linear.bias
    least = least + shift
    return least - 4 * torch.finfo(torch.float64).eps * (least.abs() + shift.abs())


def _reading(count: int | None, split: Split, norm: str, radius: float, artifact: str, why: str) -> Reading:
    n = len(split)
    conditions: dict[str, Any] = {
        "part": split.name, "norm": norm, "eps_value": radius, "eps": _in_255ths(radius),
        "bound": "a lower bound: more images may be safe from every attack, none fewer",
        "of": "the network in torch, in exact arithmetic",
    }  # fmt: skip
    if norm == "L2":
        conditions["box"] = "the Linf box that encloses the L2 ball"
    if count is None:
        return Reading(METRIC, None, "fraction", n, None, HOW, artifact, {**conditions, "why": why})
    spread = confidence.binomial(count, n)
    return Reading(METRIC, count / n, "fraction", n, spread, HOW, artifact, {**conditions, "right": count})


def _short(message: str) -> str:
    """The first sentence of a message."""
    line = next((line.strip() for line in message.splitlines() if line.strip()), "")
    sentence = line.partition(". ")[0].rstrip(".")
    return sentence if len(sentence) <= LONGEST else f"{sentence[: LONGEST - 3]}..."


def _in_255ths(radius: float) -> str:
    """As levels of 8 bits: "8/255", "0.125/255"."""
    return f"{255 * radius:.4g}/255"
