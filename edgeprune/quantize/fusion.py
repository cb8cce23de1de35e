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
from onnx import ModelProto, NodeProto, TensorProto, helper

from edgeprune.errors import ParityError
from edgeprune.onnx_graph import View, initializers, layers, value_names
from edgeprune.quantize.calibrators import Range
from edgeprune.quantize.placement import PASSING, Graph, Plan, data_inputs
from edgeprune.quantize.verification import in_integers

_MATRIX = 2


def step_before(node: NodeProto, place: int, name: str, taken: set[str]) -> NodeProto:
    """A Max of the single value that an input of a node is; the node reads that instead.

    Args:
        node: changed in place.
        name: that the step should have; it gets underscores until it is not in `taken`.
    """
    while name in taken:
        name += "_"
    taken.add(name)
    step = helper.make_node("Max", [node.input[place]], [name], name)
    node.input[place] = name
    return step


def block_sum_fusion(made: ModelProto, floats: ModelProto) -> None:
    """Keep int8 matrix products apart from the sums behind them, in place.

    ONNX Runtime else makes one float Gemm of a MatMul and the Add of its bias (MatMulAddFusion), with a Reshape on
    either side for more than two dimensions, before it looks for Q/DQ; the bias of that Gemm is float, and so it stays
    float.

    Args:
        made: Q/DQ, with unsigned activations.
    """
    ranks = {
        value.name: len(value.type.tensor_type.shape.dim)
        for value in (*floats.graph.value_info, *floats.graph.output)
        if value.type.tensor_type.HasField("shape")
    }
    rank_of = {node.name: ranks.get(node.output[0], _MATRIX) for node in floats.graph.node}
    known, taken = initializers(made.graph), value_names(made.graph)
    restored = {node.output[0] for node in made.graph.node if node.op_type == "DequantizeLinear"}
    products = {
        node.output[0]: node
        for node in made.graph.node
        if node.op_type == "MatMul" and node.input[1] in restored
    }
    nodes: list[NodeProto] = []
    for node in made.graph.node:
        for place, name in enumerate(node.input if node.op_type == "Add" else ()):
            if name in products and _becomes_gemm(
                node.input[1 - place], rank_of.get(products[name].name, _MATRIX), known
            ):
                nodes.append(step_before(node, place, f"{products[name].name}.int8", taken))
        nodes.append(node)
    kept = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del made.graph.node[:]
    made.graph.node.extend(kept)


def _becomes_gemm(other: str, rank: int, known: Mapping[str, np.ndarray]) -> bool:
    """Whether ONNX Runtime makes a Gemm of a product of so many dimensions and the sum with another value."""
    if rank == _MATRIX:
        return True
    return other in known and known[other].ndim == 1 and known[other].size > 1


Array = npt.NDArray[Any]
_WIDEST, _TRIED = 1.05, 501
_IMAGE_DIMENSIONS = 4


@dataclass(frozen=True, eq=False)
class InputQuantizer:
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


def entry(view: Graph, plan: Plan, ranges: Mapping[str, Range]) -> InputQuantizer | None:
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
    return InputQuantizer(
        value, gone, (step / factor).astype(np.float32), zeros.astype(np.uint8), step, int(zero[best]),
        step * (zeros - exact),
    )  # fmt: skip


def shifted_bias(bias: Array, weight: Array, groups: int, shifts: Array) -> Array:
    """The bias of a convolution that gives for an input moved by `shifts` what it gave for the input itself.

    Args:
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


# What ONNX Runtime's WeightBiasQuantization (1.21 and later, core/optimizer/qdq_transformer) looks at, and MatMul,
# which becomes a Gemm with the bias behind it.
TAKEN = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# What only moves values, or chooses among them: ONNX Runtime may move a DequantizeLinear through (QDQPropagation).
MOVING = frozenset((*PASSING, "Identity", "Dropout", "Expand", "Gather", "Tile"))


def block_float_fusion(model: ModelProto) -> ModelProto:
    """The model with a step between each float layer and the DequantizeLinear that it reads from, if through pools too.

    ONNX Runtime would else take a float Conv, ConvTranspose or Gemm that reads from a DequantizeLinear and is read by a
    QuantizeLinear for one whose weight was forgotten, and quantize that with one scale for the whole tensor: a layer
    that went back to float because 8 bits for each channel lose too much would lose more. It moves a DequantizeLinear
    forward and a QuantizeLinear backward over what only moves values before it looks, so what lies between counts for
    nothing; a layer with the step in front is safe whatever is behind it.
    """
    copy = ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    floats = {tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT}
    taken = {name for node in graph.node for name in node.output} | {t.name for t in graph.initializer}
    restored: set[str] = set()
    nodes: list[NodeProto] = []
    for node in graph.node:
        if node.op_type == "DequantizeLinear" or (node.op_type in MOVING and node.input[0] in restored):
            restored.update(name for name in node.output if name)
        elif node.op_type in TAKEN and node.input[0] in restored and node.input[1] in floats:
            nodes.append(step_before(node, 0, f"{node.name}.float", taken))
        nodes.append(node)
    kept = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)
    return copy


def check_floats(model: ModelProto) -> None:
    """Refuse a file whose float layers ONNX Runtime would quantize."""
    floats = [layer for layer in layers(View(model), "int8") if layer.weights and not layer.low]
    wrong = [layer.name for layer in in_integers(model, floats)] if floats else []
    if wrong:
        raise ParityError(
            f"ONNX Runtime quantizes layers that were meant to stay float: {', '.join(wrong)}",
            "this should not happen; please report it with the version of ONNX Runtime",
        )
