"""Normalization and quantization of the input as one QuantizeLinear with a scale and a zero point for each channel.

(x - mean) / std on a grid of step S and zero point z is q = round(x / (S std)) + z - mean / (S std): quantizing pixels
with scale S std and that zero point does both at once. Zero points are whole numbers, so S is chosen, a few percent
above the least one, where all of them nearly are; what is left is a known constant of each channel, which the biases
of the convolutions behind take back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeprune.nn.onnx_quantize_plan import Graph, Plan, data_inputs
from edgeprune.nn.ranges import Range

Array = npt.NDArray[Any]
_WIDEST, _TRIED = 1.05, 501
_IMAGE_DIMENSIONS = 4


@dataclass(frozen=True, eq=False)
class Entry:
    """An input that is normalized by its quantization.

    value: the normalized input. gone: the names of the nodes that normalized it. scales: float32 (C,) and zeros:
    uint8 (C,) quantize pixels. scale, zero: what the result is read with. shifts: float64 (C,), what is read there
    minus what was meant, aside from rounding.
    """

    value: str
    gone: frozenset[str]
    scales: Array
    zeros: Array
    scale: float
    zero: int
    shifts: Array


def entry(view: Graph, plan: Plan, ranges: Mapping[str, Range]) -> Entry | None:
    """How the input of a graph is normalized by quantizing it; None where float nodes need it, or it can't be."""
    value, gone, factor, offset = _normalization(view)
    read = view.readers.get(value, [])
    inside = all(node.name in plan.nodes and value in data_inputs(node) for node in read)
    if not gone or not inside or plan.pairs.get(value) != value or value not in ranges:
        return None
    if (factor <= 0).any():
        return None
    # A pixel of 0 must have a place on the grid of every channel: its zero point.
    low, high = min(ranges[value][0], offset.min()), max(ranges[value][1], offset.max())
    steps = (high - low) / 255 * np.linspace(1.0, _WIDEST, _TRIED)
    zero = np.rint(-low / steps)
    wanted = zero[:, None] + offset / steps[:, None]
    wrong = np.abs(wanted - np.rint(wanted)).max(axis=1)
    wrong[(np.rint(wanted) < 0).any(axis=1) | (np.rint(wanted) > 255).any(axis=1)] = np.inf
    best = int(np.argmin(wrong))
    if not np.isfinite(wrong[best]):
        return None
    step = float(np.float32(steps[best]))
    exact = zero[best] + offset / step
    zeros = np.rint(exact)
    return Entry(
        value, gone, (step / factor).astype(np.float32), zeros.astype(np.uint8), step, int(zero[best]),
        step * (zeros - exact),
    )  # fmt: skip


def shifted_bias(bias: Array, weight: Array, groups: int, shifts: Array) -> Array:
    """The bias of a convolution that gives for an input moved by `shifts` what it gave for the input itself.

    Args:
        bias: (O,).
        weight: (O, C / groups, ...).
        groups: of the convolution.
        shifts: (C,), one for each input channel.
    """
    sums = weight.reshape(groups, -1, weight.shape[1], int(np.prod(weight.shape[2:]))).sum(axis=3)
    return bias - np.einsum("goc,gc->go", sums, shifts.reshape(groups, -1)).ravel()


def _normalization(view: Graph) -> tuple[str, frozenset[str], Array, Array]:
    """The value at the end of the sums and products with constants that the input goes through, their names, and
    the factor and the offset (C,) that they come to."""
    source = view.graph.input[0]
    dims = [d.dim_value for d in source.type.tensor_type.shape.dim]
    channels = dims[1] if len(dims) == _IMAGE_DIMENSIONS else 0
    factor, offset = np.ones(channels), np.zeros(channels)
    value, gone = source.name, set[str]()
    while channels and (node := view.only_reader(value)) is not None:
        constant = _constant(view, node, value, channels)
        if constant is None:
            break
        if node.op_type in ("Add", "Sub"):
            offset = offset + constant if node.op_type == "Add" else offset - constant
        else:
            times = constant if node.op_type == "Mul" else 1 / constant
            factor, offset = factor * times, offset * times
        value = node.output[0]
        gone.add(node.name)
    return value, frozenset(gone), factor, offset


def _constant(view: Graph, node: Any, value: str, channels: int) -> Array | None:
    """The other operand, (C,), of a sum or product that `value` goes through; None for any other node."""
    if node.op_type not in ("Add", "Sub", "Mul", "Div") or node.output[0] in view.outputs:
        return None
    first, second = node.input
    if first != value and node.op_type in ("Sub", "Div"):
        return None
    other = view.constants.get(second if first == value else first)
    if other is None or other.ndim > _IMAGE_DIMENSIONS:
        return None
    shape = (1,) * (_IMAGE_DIMENSIONS - other.ndim) + other.shape
    if shape not in ((1, channels, 1, 1), (1, 1, 1, 1)) or not np.isfinite(other).all():
        return None
    if node.op_type == "Div" and (other == 0).any():
        return None
    return np.broadcast_to(other.reshape(-1).astype(np.float64), (channels,))
