"""Nodes that ONNX Runtime would fuse before it looks for 8 bits, kept apart by a step that changes nothing.

A Max of a single value is that value, and is not optimized away; TensorRT's parser drops it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from onnx import ModelProto, NodeProto, helper

from edgeprune.nn.onnx_prepare import initializers, value_names

_MATRIX = 2


def step_before(node: NodeProto, place: int, name: str, taken: set[str]) -> NodeProto:
    """A Max of the single value that an input of a node is; the node reads that instead.

    Args:
        node: changed in place.
        place: of the input.
        name: that the step should have; it gets underscores until it is not in `taken`.
        taken: names of values; the step's is added.
    """
    while name in taken:
        name += "_"
    taken.add(name)
    step = helper.make_node("Max", [node.input[place]], [name], name)
    node.input[place] = name
    return step


def sums_apart(made: ModelProto, floats: ModelProto) -> None:
    """Keep int8 matrix products apart from the sums behind them, in place.

    ONNX Runtime else makes one float Gemm of a MatMul and the Add of its bias (MatMulAddFusion), with a Reshape on
    either side for more than two dimensions, before it looks for Q/DQ; the bias of that Gemm is float, and so it stays
    float.

    Args:
        made: Q/DQ, with unsigned activations.
        floats: what it was made from, with the names and shapes that it had.
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
