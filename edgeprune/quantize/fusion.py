"""What ONNX Runtime must not fuse in a Q/DQ model, and the normalization of the input as part of its quantization."""

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper

from edgeprune.onnx_graph import Array, View, maker_of, unique, value_names
from edgeprune.quantize.calibrators import Range
from edgeprune.quantize.placement import PASSING, Plan, data_inputs

_MATRIX, _IMAGE_DIMENSIONS = 2, 4
# ONNX Runtime's WeightBiasQuantization (1.21 and later, core/optimizer/qdq_transformer) quantizes these, and MatMul,
# which becomes a Gemm with the bias after it.
TAKEN = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# ONNX Runtime may move a DequantizeLinear through these (QDQPropagation).
MOVING = frozenset((*PASSING, "Identity", "Dropout", "Expand", "Gather", "Tile"))
# How much larger than the least step the input's may be, and how many steps are tried.
_WIDEST, _TRIED = 1.05, 501


def block_sum_fusion(model: ModelProto, floats: ModelProto) -> None:
    """Keep int8 matrix products apart from the sums after them, in place.

    Otherwise ONNX Runtime first makes one float Gemm of a MatMul and the Add of its bias (MatMulAddFusion), with a
    Reshape on either side for more than two dimensions; the bias of that Gemm is float, and so it stays float.

    Args:
        model: Q/DQ, with unsigned activations.
        floats: what it was made from, with the same names and with shapes.
    """
    shapes, view = View(floats), View(model)
    outputs = {node.name: node.output[0] for node in floats.graph.node}
    products = {
        node.output[0]: node
        for node in model.graph.node
        if node.op_type == "MatMul" and maker_of(view, node.input[1], "DequantizeLinear")
    }

    def sums(node: NodeProto) -> Iterable[tuple[int, str]]:
        for place, name in enumerate(node.input if node.op_type == "Add" else ()):
            if name in products:
                product, other = products[name].name, view.constant(node.input[1 - place])
                vector = other is not None and other.ndim == 1 and other.size > 1
                if vector or len(shapes.shape(outputs.get(product, ""))) in (0, _MATRIX):
                    yield place, f"{product}.int8"

    _insert_steps(model, sums)


def block_float_fusion(model: ModelProto) -> None:
    """Keep each float layer apart from the DequantizeLinear that it reads from, if through pools too, in place.

    Otherwise ONNX Runtime takes a float Conv, ConvTranspose or Gemm between a DequantizeLinear and a QuantizeLinear for
    one whose weight was forgotten, and quantizes that with one scale for the whole tensor: a layer that went back to
    float because int8 for each channel loses too much would lose more. It first moves a DequantizeLinear forward and a
    QuantizeLinear backward over what only moves values, so such nodes in between make no difference.
    """
    floats = {tensor.name for tensor in model.graph.initializer if tensor.data_type == TensorProto.FLOAT}
    restored: set[str] = set()

    def float_layers(node: NodeProto) -> Iterable[tuple[int, str]]:
        if node.op_type == "DequantizeLinear" or (node.op_type in MOVING and node.input[0] in restored):
            restored.update(name for name in node.output if name)
        elif node.op_type in TAKEN and node.input[0] in restored and node.input[1] in floats:
            yield 0, f"{node.name}.float"

    _insert_steps(model, float_layers)


def _insert_steps(model: ModelProto, inputs: Callable[[NodeProto], Iterable[tuple[int, str]]]) -> None:
    """Insert a Max of one value, which changes nothing, before some inputs of nodes.

    Args:
        inputs: of a node: (position, name of the step).
    """
    taken, nodes = value_names(model.graph), list[NodeProto]()
    for node in model.graph.node:
        for position, name in inputs(node):
            step = unique(name, taken)
            nodes.append(helper.make_node("Max", [node.input[position]], [step], step))
            node.input[position] = step
        nodes.append(node)
    copies = deepcopy(nodes)
    del model.graph.node[:]
    model.graph.node.extend(copies)


@dataclass(frozen=True, eq=False)
class InputQuantizer:
    """An input that is normalized by its quantization: a QuantizeLinear with a scale and zero point for each channel.

    (x - mean) / std with step S and zero point z is q = round(x / (S std)) + z - mean / (S std). Zero points are whole
    numbers, so S is chosen, a few percent above the least one, where all of them nearly are; the remainder is a known
    constant of each channel, which the biases of the convolutions after it take back.

    value: the normalized input. removed: the nodes that normalized it. scales: float32 (C,) and zeros: uint8 (C,)
    quantize pixels. scale, zero: dequantize the result. shifts: float64 (C,), its offset aside from rounding.
    """

    value: str
    removed: frozenset[str]
    scales: Array
    zeros: Array
    scale: float
    zero: int
    shifts: Array


def input_quantizer(view: View, plan: Plan, ranges: Mapping[str, Range]) -> InputQuantizer | None:
    """How the input is normalized by quantizing it; None where float nodes read it, or it can't be."""
    value, removed, factor, offset = _normalization(view)
    int8 = all(n.name in plan.nodes and value in data_inputs(n) for n in view.readers.get(value, ()))
    if (
        not removed
        or not int8
        or plan.pairs.get(value) != value
        or value not in ranges
        or (factor <= 0).any()
    ):
        return None
    # A pixel of 0 must have a place on the grid of every channel: its zero point.
    low, high = min(ranges[value][0], offset.min()), max(ranges[value][1], offset.max())
    steps = (high - low) / 255 * np.linspace(1.0, _WIDEST, _TRIED)
    zero = np.rint(-low / steps)
    exact = zero[:, None] + offset / steps[:, None]
    error = np.abs(exact - np.rint(exact)).max(axis=1)
    error[(np.rint(exact) < 0).any(axis=1) | (np.rint(exact) > 255).any(axis=1)] = np.inf
    best = int(np.argmin(error))
    if not np.isfinite(error[best]):
        return None
    step = float(np.float32(steps[best]))
    exact = zero[best] + offset / step
    zeros = np.rint(exact)
    return InputQuantizer(
        value, removed, (step / factor).astype(np.float32), zeros.astype(np.uint8), step, int(zero[best]),
        step * (zeros - exact),
    )  # fmt: skip


def shifted_bias(bias: Array, weight: Array, groups: int, shifts: Array) -> Array:
    """The bias (O,) with which a convolution gives the same output for an input shifted by `shifts` (C,).

    Args:
        weight: (O, C / groups, ...).
    """
    sums = weight.reshape(groups, -1, weight.shape[1], int(np.prod(weight.shape[2:]))).sum(axis=3)
    return bias - np.einsum("goc,gc->go", sums, shifts.reshape(groups, -1)).ravel()


def _normalization(view: View) -> tuple[str, frozenset[str], Array, Array]:
    """The value after the sums and products with constants at the input, their names, their factor and offset (C,)."""
    source = view.graph.input[0]
    dims = [d.dim_value for d in source.type.tensor_type.shape.dim]
    channels = dims[1] if len(dims) == _IMAGE_DIMENSIONS else 0
    factor, offset = np.ones(channels), np.zeros(channels)
    value, removed = source.name, set[str]()
    while channels and (node := view.only_reader(value)) is not None:
        constant = _per_channel(view, node, value, channels)
        if constant is None:
            break
        if node.op_type in ("Add", "Sub"):
            offset = offset + constant if node.op_type == "Add" else offset - constant
        else:
            times = constant if node.op_type == "Mul" else 1 / constant
            factor, offset = factor * times, offset * times
        value = node.output[0]
        removed.add(node.name)
    return value, frozenset(removed), factor, offset


def _per_channel(view: View, node: NodeProto, value: str, channels: int) -> Array | None:
    """The constant operand, (C,), of a sum or product with `value`; None for any other node."""
    if node.op_type not in ("Add", "Sub", "Mul", "Div") or node.output[0] in view.outputs:
        return None
    first, second = node.input
    if first != value and node.op_type in ("Sub", "Div"):
        return None
    other = view.constant(second if first == value else first)
    if other is None or other.ndim > _IMAGE_DIMENSIONS:
        return None
    shape = (1,) * (_IMAGE_DIMENSIONS - other.ndim) + other.shape
    if shape not in ((1, channels, 1, 1), (1, 1, 1, 1)) or not np.isfinite(other).all():
        return None
    if node.op_type == "Div" and (other == 0).any():
        return None
    return np.broadcast_to(other.reshape(-1).astype(np.float64), (channels,))
