"""Cross-layer equalization: scale channels between two layers so that none is lost in int8, with the same logits.

Nagel, van Baalen, Blankevoort, Welling: Data-Free Quantization Through Weight Equalization and Bias Correction, ICCV
2019 (arXiv 1906.04721), section 4.1. Because a ReLU commutes with positive factors, channel i that one layer makes may
be divided by s_i when the next layer multiplies it by s_i again. A depthwise convolution is the second of one pair and
the first of the next, so sweeping over pairs until nothing changes equalizes all layers of an inverted residual.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, numpy_helper

from edgeprune.onnx_graph import View, attribute, copied, operand
from edgeprune.quantize.placement import clip_bounds

if TYPE_CHECKING:
    from edgeprune.quantize.observers import Activations

SWEEPS = 100
CONVERGED = 1e-3
# A ceiling that at most this share of the values reached is none.
REACHED = 1e-3
# Beyond this, a channel of nearly zero weights would be blown up until its bias alone fills the range of all.
MOST = 1e4

# They commute with a positive factor for each channel, and keep the order of channels.
_COMMUTING = frozenset(
    ("Relu", "LeakyRelu", "PRelu", "Abs", "Identity", "Dropout", "MaxPool", "AveragePool", "GlobalAveragePool",
     "GlobalMaxPool", "LpPool", "GlobalLpPool")
)  # fmt: skip
_REDUCING = frozenset(("ReduceMean", "ReduceMax", "ReduceMin", "ReduceSum", "ReduceL1", "ReduceL2"))
_FLAT = frozenset(("Flatten", "Reshape", "Squeeze"))
_LAYERS = frozenset(("Conv", "ConvTranspose", "Gemm", "MatMul"))

_Weights = npt.NDArray[np.float64]


@dataclass(frozen=True)
class _Pair:
    """The layer that makes channels, the only one that reads them, and the ceilings in between that must go."""

    first: NodeProto
    second: NodeProto
    clips: tuple[NodeProto, ...]


def equalized(model: ModelProto, seen: Activations | None = None) -> tuple[ModelProto, int]:
    """A copy in which the weights of each channel have the same range in the layer before and the layer after.

    For each pair of layers of which the second alone reads the first, through ReLUs, pools and flattening,
    s_i = sqrt(r1_i r2_i) / r2_i (eq. 11) with r1_i = max |W1[i]| and r2_i = max |W2[:, i]|; W1 and b1 are divided by
    s, W2 is multiplied by it, until no s is more than 0.1 % from 1. Channels without weights stay. The logits stay the
    same to the rounding of float32.

    Args:
        seen: the activations of `model`. A Clip(0, c), whose ceiling does not commute, blocks a pair; it becomes a Relu
            where at most 0.1 % of its inputs reached c, which may change logits.

    Returns:
        The copy, and the number of equalized pairs.
    """
    copy = copied(model)
    view = View(copy)
    layers = _Layers(view)
    pairs = list(_pairs(view, layers, seen or {}))
    for _ in range(SWEEPS):
        if max((layers.equalize(pair) for pair in pairs), default=0.0) < CONVERGED:
            break
    for clip in {id(clip): clip for pair in pairs for clip in pair.clips}.values():
        clip.op_type = "Relu"
        del clip.input[1:]
    layers.write()
    return copy, len(pairs)


class _Layers:
    """The weights of the layers of a graph in float64, output channels first, by the name of the initializer."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.weights: dict[str, _Weights] = {}
        self.totals: dict[str, _Weights] = {}

    def fits(self, node: NodeProto) -> bool:
        """Whether a node is a layer whose weight and bias belong to it alone."""
        if node.op_type not in _LAYERS or operand(node, 1) not in self.view.initializers:
            return False
        if node.op_type == "Gemm" and attribute(node, "transA", 0):
            return False
        weight, bias = self.view.initializers[node.input[1]], operand(node, 2)
        if len(weight.dims) < 2 or (node.op_type == "MatMul" and len(weight.dims) != 2):
            return False
        if self.view.uses(node.input[1]) != 1 or not bias:
            return self.view.uses(node.input[1]) == 1
        stored = self.view.initializers.get(bias)
        return stored is not None and self.view.uses(bias) == 1 and prod(stored.dims) == self.made(node)

    def made(self, node: NodeProto) -> int:
        """How many channels a layer makes."""
        return self._rows(node).shape[0]

    def read(self, node: NodeProto) -> int:
        """How many channels a layer reads."""
        return self._rows(node).shape[1] * _groups(node)

    def equalize(self, pair: _Pair) -> float:
        """Scale each channel of a pair to equal ranges; returns the largest difference of a factor from 1."""
        first, second = self._rows(pair.first), self._rows(pair.second)
        channels, groups = first.shape[0], _groups(pair.second)
        # (groups, outputs of the group, inputs of the group, kernel): channel i is input i % inputs of its group.
        by_group = second.reshape(groups, second.shape[0] // groups, *second.shape[1:])
        spread = np.moveaxis(by_group, 2, 1).reshape(channels, -1)
        before, after = np.abs(first.reshape(channels, -1)).max(1), np.abs(spread).max(1)
        alive = (before > 0) & (after > 0)
        factor = np.sqrt(np.divide(before, after, out=np.ones(channels), where=alive))
        total = self.totals.setdefault(pair.first.input[1], np.ones(channels))
        factor = np.clip(total * factor, 1 / MOST, MOST) / total
        total *= factor
        first /= factor.reshape(-1, *[1] * (first.ndim - 1))
        columns = factor.repeat(second.shape[1] * groups // channels).reshape(groups, 1, second.shape[1])
        by_group *= columns.reshape(*columns.shape, *[1] * (by_group.ndim - 3))
        return float(np.abs(factor - 1).max())

    def write(self) -> None:
        """Put the weights, and the biases of the scaled channels, back into the graph."""
        for node in self.view.graph.node:
            if node.op_type not in _LAYERS or operand(node, 1) not in self.weights:
                continue
            self._put(node.input[1], _to_rows(node, self.weights[node.input[1]]))
            total = self.totals.get(node.input[1])
            if total is not None and operand(node, 2):
                bias = numpy_helper.to_array(self.view.initializers[node.input[2]]).astype(np.float64)
                self._put(node.input[2], bias / total)

    def _rows(self, node: NodeProto) -> _Weights:
        name = node.input[1]
        if name not in self.weights:
            array = numpy_helper.to_array(self.view.initializers[name]).astype(np.float64)
            self.weights[name] = np.ascontiguousarray(_to_rows(node, array))
        return self.weights[name]

    def _put(self, name: str, array: _Weights) -> None:
        self.view.initializers[name].CopyFrom(numpy_helper.from_array(array.astype(np.float32), name))


def _groups(node: NodeProto) -> int:
    return int(attribute(node, "group", 1))


def _to_rows(node: NodeProto, array: _Weights) -> _Weights:
    """Weights as (outputs, inputs of the group, kernel...), which is how a Conv has them, and back again."""
    if node.op_type == "ConvTranspose":
        split = array.reshape(_groups(node), -1, *array.shape[1:])
        return np.swapaxes(split, 1, 2).reshape(-1, split.shape[1], *array.shape[2:])
    transposed = node.op_type == "MatMul" or (node.op_type == "Gemm" and not attribute(node, "transB", 0))
    return array.T if transposed else array


def _pairs(view: View, layers: _Layers, seen: Activations) -> Iterator[_Pair]:
    for first in view.graph.node:
        # A MatMul gets its bias from an Add, which no factor passes.
        if first.op_type == "MatMul" or not layers.fits(first):
            continue
        value, clips = first.output[0], []
        while (node := view.only_reader(value)) is not None and node.op_type not in _LAYERS:
            low, high = clip_bounds(view, node) if node.op_type == "Clip" else (np.nan, np.nan)
            if low == 0.0 and 0.0 < high < np.inf:
                clips.append(node)
            elif not _passes(view, node, layers.made(first)):
                break
            value = node.output[0]
        if node is None or not layers.fits(node) or node.input[0] != value:
            continue
        # A MatMul sums over the last axis, which holds the channels only when there are two.
        aligned = node.op_type != "MatMul" or len(view.shape(value)) == 2
        fits = aligned and layers.read(node) % layers.made(first) == 0
        if fits and all(_is_idle(view, clip, seen) for clip in clips):
            yield _Pair(first, node, tuple(clips))


def _passes(view: View, node: NodeProto, channels: int) -> bool:
    """Whether a factor for each channel may be applied after a node as well as before it."""
    if node.op_type in _COMMUTING:
        return len([name for name in node.output if name]) == 1
    before = view.shape(node.input[0])
    if node.op_type == "Clip":
        return clip_bounds(view, node) == (0.0, np.inf)
    if node.op_type in _REDUCING:
        axes = _ints(view, node, "axes")
        return bool(axes) and len(before) == 4 and all(axis > 1 or axis in (-1, -2) for axis in axes)
    if node.op_type == "Pad":
        return len(before) == 4 and _pads_around(view, node)
    if node.op_type in _FLAT:
        after = view.shape(node.output[0])
        if len(before) < 2 or len(after) != 2 or None in before[1:]:
            return False
        return before[1] == channels and after[1] == prod(size or 0 for size in before[1:])
    return False


def _pads_around(view: View, node: NodeProto) -> bool:
    """Whether a Pad of images adds no channels, and no other value than zero."""
    pads = _ints(view, node, "pads")
    value = view.constant(operand(node, 2)) if operand(node, 2) else np.zeros(())
    if len(pads) != 8 or operand(node, 3) or value is None:
        return False
    return not any(pads[i] for i in (0, 1, 4, 5)) and not value.any() and not attribute(node, "value", 0.0)


def _ints(view: View, node: NodeProto, name: str) -> list[int]:
    """Integers that older operator sets keep in an attribute and newer ones in the second input."""
    array = view.constant(operand(node, 1))
    values: Any = attribute(node, name, ()) if array is None else array.ravel()
    return [int(v) for v in values]


def _is_idle(view: View, clip: NodeProto, seen: Activations) -> bool:
    """Whether at most `REACHED` of the values reached a ceiling; of the bin that it falls in, all count."""
    before, limit = seen.get(clip.input[0]), clip_bounds(view, clip)[1]
    if before is None:
        return False
    if before.high <= limit:
        return True
    edges = np.linspace(before.edge_low, before.edge_high, len(before.counts) + 1)
    return bool(before.counts[edges[1:] > limit].sum() / max(1, before.counts.sum())) <= REACHED
