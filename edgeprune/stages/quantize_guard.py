"""Keeping float what is meant to be float: ONNX Runtime quantizes weights between Q/DQ itself, by tensor, unasked."""

from __future__ import annotations

from collections.abc import Iterator

from onnx import ModelProto, NodeProto, TensorProto, helper

from edgeprune.errors import ParityError
from edgeprune.nn.onnx_proof_layers import layers
from edgeprune.nn.onnx_proof_runtime import in_integers
from edgeprune.nn.onnx_view import View

# What ONNX Runtime's WeightBiasQuantization (1.21 and later, core/optimizer/qdq_transformer) looks at.
TAKEN = ("Conv", "ConvTranspose", "Gemm")


def guarded(model: ModelProto) -> ModelProto:
    """The model with a step between each float layer and the DequantizeLinear that it reads from.

    ONNX Runtime would else take a float Conv, ConvTranspose or Gemm that reads from a DequantizeLinear and is read by a
    QuantizeLinear for one whose weight was forgotten, and quantize that with one scale for the whole tensor: a layer
    that went back to float because 8 bits for each channel lose too much would lose more. A Max of a single value is
    that value, and is not optimized away; TensorRT's parser drops it.
    """
    copy = ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    floats = {tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT}
    restored = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    taken = {name for node in graph.node for name in node.output} | {t.name for t in graph.initializer}
    nodes = [part for node in graph.node for part in _apart(node, floats, restored, taken)]
    del graph.node[:]
    graph.node.extend(nodes)
    return copy


def check_floats(model: ModelProto) -> None:
    """Refuse a file whose float layers ONNX Runtime would quantize.

    Raises:
        ParityError: it would; names them.
    """
    floats = [layer for layer in layers(View(model), "int8") if layer.weights and not layer.low]
    wrong = [layer.name for layer in in_integers(model, floats)] if floats else []
    if wrong:
        raise ParityError(
            f"ONNX Runtime quantizes layers that were meant to stay float: {', '.join(wrong)}",
            "this should not happen; please report it with the version of ONNX Runtime",
        )


def _apart(node: NodeProto, floats: set[str], restored: set[str], taken: set[str]) -> Iterator[NodeProto]:
    if node.op_type in TAKEN and node.input[0] in restored and node.input[1] in floats:
        name = f"{node.name}.float"
        while name in taken:
            name += "_"
        taken.add(name)
        yield helper.make_node("Max", [node.input[0]], [name], name=name)
        node.input[0] = name
    yield node
