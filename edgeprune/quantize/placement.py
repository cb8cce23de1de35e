"""Which nodes of a prepared ONNX model compute on 8 bits, and which of its values are quantized for that."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto

from edgeprune.onnx_graph import View, attribute, operand
from edgeprune.quantize.calibrators import Range, grid

# Their weights can be int8.
WEIGHTED = ("Conv", "Gemm", "MatMul")
# ONNX Runtime has 8-bit kernels for these, with a grid of their own for the output.
COMPUTING = ("Add", "Mul", "GlobalAveragePool", "AveragePool", "Concat", "Sigmoid", "LeakyRelu")
# These only move or select values: the grid stays.
PASSING = (
    "MaxPool", "Flatten", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "DepthToSpace",
    "SpaceToDepth", "Pad",
)  # fmt: skip
ACTIVATIONS = ("Relu", "Clip")
_EVERY_INPUT = ("Add", "Mul", "Concat")
_MATRIX = 2


@dataclass(frozen=True)
class Plan:
    """What becomes of each node and value.

    nodes: those that compute on 8 bits. pairs: value -> the value whose range it shares; each gets a QuantizeLinear and
    a DequantizeLinear. made: the values of `pairs` that an 8-bit node makes; every reader gets their 8-bit form.
    fused: activation -> its output, which the node before it makes then; clipping to the 8-bit range does the same.
    """

    nodes: frozenset[str]
    pairs: Mapping[str, str]
    made: frozenset[str]
    fused: Mapping[str, str]


def quantizable(model: ModelProto) -> tuple[str, ...]:
    """The names of the nodes whose weights can be int8, in order: Conv, Gemm and MatMul with constant weights."""
    view = View(model)
    return tuple(node.name for node in model.graph.node if _has_int8_form(view, node))


def data_inputs(node: NodeProto) -> tuple[str, ...]:
    """The values that a node computes on, without its weights and settings."""
    return tuple(node.input) if node.op_type in _EVERY_INPUT else tuple(node.input[:1])


def unsigned(model: ModelProto, ranges: Mapping[str, Range], skip: Collection[str]) -> Plan:
    """The plan for ONNX Runtime: what lies between 8-bit nodes stays on 8 bits, and activations become clipping."""
    view = View(model)
    weighted = set(quantizable(model)) - set(skip)
    fused = _fused(view, ranges, weighted, skip)
    nodes = _int8_nodes(view, weighted, fused, skip)
    pairs: dict[str, str] = {}
    made: set[str] = set()
    removed: dict[str, str] = {}
    for node in view.graph.node:
        if node.name not in nodes:
            continue
        for value in data_inputs(node):
            pairs.setdefault(value, value)
        activation = fused.get(node.name)
        out = activation.output[0] if activation else node.output[0]
        if node.op_type in ("Gemm", "MatMul") and not _feeds(view, out, nodes):
            # Its kernel gives float as well, which is exact.
            continue
        if activation is not None:
            removed[activation.name] = out
        # The second output of a MaxPool is indices.
        for value in node.output if node.op_type == "Split" else (out,):
            pairs[value] = pairs[node.input[0]] if node.op_type in PASSING else value
            made.add(value)
    return Plan(frozenset(nodes), pairs, frozenset(made), removed)


def signed(model: ModelProto, skip: Collection[str]) -> Plan:
    """The plan for TensorRT: the inputs of weighted nodes and pools, and the branch of a sum that no convolution ends.

    A convolution's own output stays float, so that it fuses with the sum and the activation after it.
    """
    view = View(model)
    weighted = set(quantizable(model)) - set(skip)
    nodes, pairs = set(weighted), dict[str, str]()
    for node in view.graph.node:
        if node.name in skip:
            continue
        if node.name in weighted:
            pairs[node.input[0]] = node.input[0]
        elif node.op_type in ("GlobalAveragePool", "AveragePool") and _from(view, node.input[0], nodes):
            pairs[node.input[0]] = node.input[0]
            nodes.add(node.name)
        elif node.op_type == "Add" and not any(value in view.initializers for value in node.input):
            ends = [value for value in node.input if _ends_in(view, value, weighted)]
            if ends:
                pairs.update({value: value for value in node.input if value != ends[-1]})
                nodes.add(node.name)
    return Plan(frozenset(nodes), pairs, frozenset(), {})


def clip_bounds(view: View, node: NodeProto) -> Range:
    """The bounds of a Clip; NaN for one that is computed."""
    bounds: list[float] = []
    for position, (name, default) in enumerate((("min", -np.inf), ("max", np.inf)), start=1):
        given = view.constant(operand(node, position))
        computed = bool(operand(node, position)) and given is None
        bounds.append(
            np.nan if computed else float(attribute(node, name, default) if given is None else given)
        )
    return bounds[0], bounds[1]


def _has_int8_form(view: View, node: NodeProto) -> bool:
    if node.op_type not in WEIGHTED or node.input[0] in view.initializers:
        return False
    weight, bias = view.initializers.get(operand(node, 1)), operand(node, 2)
    if weight is None or weight.data_type != TensorProto.FLOAT or 0 in weight.dims:
        return False
    if bias and bias not in view.initializers:
        return False
    if node.op_type == "Gemm" and (
        attribute(node, "alpha", 1.0) != 1
        or attribute(node, "beta", 1.0) != 1
        or attribute(node, "transA", 0)
    ):
        return False
    return len(weight.dims) > _MATRIX if node.op_type == "Conv" else len(weight.dims) == _MATRIX


def _fused(
    view: View, ranges: Mapping[str, Range], weighted: Collection[str], skip: Collection[str]
) -> dict[str, NodeProto]:
    """Node -> the activation after it whose effect clipping to the 8-bit range has as well."""
    found: dict[str, NodeProto] = {}
    for node in view.graph.node:
        if node.name in skip or not (node.name in weighted or node.op_type in COMPUTING):
            continue
        after = view.only_reader(node.output[0])
        if after is None or after.op_type not in ACTIVATIONS or after.name in skip:
            continue
        bounds = ranges.get(after.output[0])
        if bounds and after.input[0] == node.output[0] and _is_clipping(view, after, bounds):
            found[node.name] = after
    return found


def _is_clipping(view: View, activation: NodeProto, output: Range) -> bool:
    """Whether the 8-bit range of an activation's output clips to the bit what the activation does."""
    low, high = (0.0, np.inf) if activation.op_type == "Relu" else clip_bounds(view, activation)
    scale, zero = grid(*output, symmetric=False)
    return bool(np.rint(low / scale) + zero <= 0 and np.rint(high / scale) + zero >= 255)


def _int8_nodes(
    view: View, weighted: Collection[str], fused: Mapping[str, NodeProto], skip: Collection[str]
) -> set[str]:
    """The weighted nodes, and the largest set of nodes with 8-bit kernels between 8-bit nodes."""
    able = {
        node.name: node
        for node in view.graph.node
        if node.op_type in (*COMPUTING, *PASSING)
        and node.name not in skip
        and not any(value in view.initializers for value in data_inputs(node))
        and (node.op_type != "Pad" or _pads_zeros(view, node))
    }
    maker = {activation.output[0]: name for name, activation in fused.items()}
    nodes = set(weighted) | set(able)

    def is_int8(value: str) -> bool:
        producer = view.producers.get(value)
        return maker.get(value) in nodes or (producer is not None and producer.name in nodes)

    def stays(node: NodeProto) -> bool:
        outputs = fused[node.name].output if node.name in fused else node.output
        return any(map(is_int8, data_inputs(node))) and any(_feeds(view, value, nodes) for value in outputs)

    while leaving := {name for name, node in able.items() if name in nodes and not stays(node)}:
        nodes -= leaving
    return nodes


def _pads_zeros(view: View, node: NodeProto) -> bool:
    if attribute(node, "mode", b"constant") != b"constant" or not operand(node, 2):
        return True
    value = view.constant(node.input[2])
    return value is not None and not value.any()


def _feeds(view: View, value: str, nodes: Collection[str]) -> bool:
    return any(node.name in nodes and value in data_inputs(node) for node in view.readers.get(value, ()))


def _from(view: View, value: str, nodes: Collection[str]) -> bool:
    """Whether a node of `nodes` makes a value, perhaps with activations and moves in between."""
    producer = view.producers.get(value)
    while producer is not None and producer.name not in nodes:
        if producer.op_type not in (*ACTIVATIONS, *PASSING):
            return False
        producer = view.producers.get(producer.input[0])
    return producer is not None


def _ends_in(view: View, value: str, weighted: Collection[str]) -> bool:
    producer = view.producers.get(value)
    return producer is not None and producer.name in weighted and view.only_reader(value) is not None
