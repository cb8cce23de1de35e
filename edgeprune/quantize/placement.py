"""Which nodes of an ONNX model compute on 8 bits, and which of its values are quantized for that."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import GraphProto, ModelProto, NodeProto

from edgeprune.onnx_graph import attributes, consumers, initializers
from edgeprune.quantize.calibrators import Range, grid

Array = npt.NDArray[Any]
# What has a weight that can be int8, and the axis of the weight that counts its outputs.
WEIGHTED = ("Conv", "Gemm", "MatMul")
# What ONNX Runtime has 8-bit kernels for, each with a grid of its own for what it gives.
COMPUTING = ("Add", "Mul", "GlobalAveragePool", "AveragePool", "Concat", "Sigmoid", "LeakyRelu")
# What only moves values, or chooses among them: the grid stays.
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

    nodes: the names of the nodes that compute on 8 bits. pairs: value -> the value whose range it shares; each gets a
    QuantizeLinear and a DequantizeLinear. made: the values of `pairs` that an 8-bit node makes, which everybody reads
    in their 8-bit form. gone: name of an activation -> the value that goes on in its place; clipping to the 8-bit
    range does what it did.
    """

    nodes: frozenset[str]
    pairs: Mapping[str, str]
    made: frozenset[str]
    gone: Mapping[str, str]


def quantizable(model: ModelProto) -> tuple[str, ...]:
    """The names of the nodes whose weights can be int8, in order: Conv, Gemm and MatMul with constant weights."""
    known = initializers(model.graph)
    return tuple(node.name for node in model.graph.node if _has_int8_form(node, known))


def data_inputs(node: NodeProto) -> tuple[str, ...]:
    """The values that a node computes on, without its weights and settings."""
    return tuple(node.input) if node.op_type in _EVERY_INPUT else tuple(node.input[:1])


class Graph:
    """A prepared graph with what one asks of it again and again."""

    def __init__(self, graph: GraphProto) -> None:
        self.graph = graph
        self.constants = initializers(graph)
        self.producers = {name: node for node in graph.node for name in node.output if name}
        self.readers = consumers(graph)
        self.outputs = {value.name for value in graph.output}

    def only_reader(self, value: str) -> NodeProto | None:
        """The node that reads a value, if it is one alone."""
        found = self.readers.get(value, [])
        alone = len(found) == 1 and value not in self.outputs
        return found[0] if alone else None


def unsigned(model: ModelProto, ranges: Mapping[str, Range], skip: Collection[str]) -> Plan:
    """The plan for ONNX Runtime: all that lies between 8-bit nodes stays on 8 bits, and activations are clippings."""
    view = Graph(model.graph)
    weighted = set(quantizable(model)) - set(skip)
    fused = _fused(view, ranges, weighted, skip)
    nodes = _settle(view, weighted, fused, skip)
    pairs: dict[str, str] = {}
    made: set[str] = set()
    gone: dict[str, str] = {}
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
            gone[activation.name] = out
        # The second output of a MaxPool is indices.
        for value in node.output if node.op_type == "Split" else (out,):
            passes = node.op_type in PASSING
            pairs[value] = pairs[node.input[0]] if passes else value
            made.add(value)
    return Plan(frozenset(nodes), pairs, frozenset(made), gone)


def signed(model: ModelProto, skip: Collection[str]) -> Plan:
    """The plan for TensorRT: what weighted nodes and pools read, and the branch of a sum that no convolution ends.

    A convolution's own output stays float, so that it fuses with the sum and the activation behind it.
    """
    view = Graph(model.graph)
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
        elif node.op_type == "Add" and not any(value in view.constants for value in node.input):
            ends = [value for value in node.input if _ends(view, value, weighted)]
            if ends:
                pairs.update({value: value for value in node.input if value != ends[-1]})
                nodes.add(node.name)
    return Plan(frozenset(nodes), pairs, frozenset(), {})


def _has_int8_form(node: NodeProto, known: Mapping[str, Array]) -> bool:
    if node.op_type not in WEIGHTED or len(node.input) < 2 or node.input[0] in known:
        return False
    weight = known.get(node.input[1])
    if weight is None or weight.dtype != np.float32 or not weight.size:
        return False
    if len(node.input) > 2 and node.input[2] and node.input[2] not in known:
        return False
    given = attributes(node)
    if node.op_type == "Gemm" and (
        given.get("alpha", 1.0) != 1 or given.get("beta", 1.0) != 1 or given.get("transA", 0)
    ):
        return False
    return weight.ndim > _MATRIX if node.op_type == "Conv" else weight.ndim == _MATRIX


def _fused(
    view: Graph, ranges: Mapping[str, Range], weighted: Collection[str], skip: Collection[str]
) -> dict[str, NodeProto]:
    """Node -> the activation behind it that clipping to the 8-bit range does as well."""
    found: dict[str, NodeProto] = {}
    for node in view.graph.node:
        if node.name in skip or not (node.name in weighted or node.op_type in COMPUTING):
            continue
        after = view.only_reader(node.output[0])
        if after is None or after.op_type not in ACTIVATIONS or after.name in skip:
            continue
        if after.input[0] == node.output[0] and _is_clipping(
            after, ranges.get(after.output[0]), view.constants
        ):
            found[node.name] = after
    return found


def _is_clipping(node: NodeProto, bounds: Range | None, known: Mapping[str, Array]) -> bool:
    """Whether what an activation clips away is clipped away by the 8-bit range of its output, to the bit."""
    limits = _limits(node, known)
    if bounds is None or limits is None:
        return False
    scale, zero = grid(*bounds, symmetric=False)
    return np.rint(limits[0] / scale) + zero <= 0 and np.rint(limits[1] / scale) + zero >= 255


def _limits(node: NodeProto, known: Mapping[str, Array]) -> Range | None:
    if node.op_type == "Relu":
        return 0.0, np.inf
    given = attributes(node)
    limits = [float(given.get("min", -np.inf)), float(given.get("max", np.inf))]
    for place, name in enumerate(node.input[1:3]):
        if name and name not in known:
            return None
        if name:
            limits[place] = float(known[name])
    return limits[0], limits[1]


def _settle(
    view: Graph, weighted: Collection[str], fused: Mapping[str, NodeProto], skip: Collection[str]
) -> set[str]:
    """All nodes on 8 bits: the weighted ones, and those between them that have kernels. The largest such set."""
    able = {
        node.name: node
        for node in view.graph.node
        if node.op_type in (*COMPUTING, *PASSING)
        and node.name not in skip
        and not any(value in view.constants for value in data_inputs(node))
        and (node.op_type != "Pad" or _pads_zeros(node, view.constants))
    }
    behind = {activation.output[0]: name for name, activation in fused.items()}
    nodes = set(weighted) | set(able)

    def gets(value: str) -> bool:
        producer = view.producers.get(value)
        return behind.get(value) in nodes or (producer is not None and producer.name in nodes)

    def stays(node: NodeProto) -> bool:
        activation = fused.get(node.name)
        given = activation.output if activation else node.output
        return any(map(gets, data_inputs(node))) and any(_feeds(view, value, nodes) for value in given)

    while leaving := {name for name, node in able.items() if name in nodes and not stays(node)}:
        nodes -= leaving
    return nodes


def _pads_zeros(node: NodeProto, known: Mapping[str, Array]) -> bool:
    if attributes(node).get("mode", b"constant") != b"constant":
        return True
    name = node.input[2] if len(node.input) > 2 else ""
    return not name or (name in known and not known[name].any())


def _feeds(view: Graph, value: str, nodes: Collection[str]) -> bool:
    return any(node.name in nodes and value in data_inputs(node) for node in view.readers.get(value, ()))


def _from(view: Graph, value: str, nodes: Collection[str]) -> bool:
    """Whether a node of `nodes` makes a value, perhaps with activations and moves in between."""
    producer = view.producers.get(value)
    while producer is not None and producer.name not in nodes:
        if producer.op_type not in (*ACTIVATIONS, *PASSING):
            return False
        producer = view.producers.get(producer.input[0])
    return producer is not None


def _ends(view: Graph, value: str, weighted: Collection[str]) -> bool:
    producer = view.producers.get(value)
    return producer is not None and producer.name in weighted and view.only_reader(value) is not None
