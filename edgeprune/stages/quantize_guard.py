"""Keeping float what is meant to be float: ONNX Runtime quantizes weights between Q/DQ itself, by tensor, unasked."""

from __future__ import annotations

from onnx import ModelProto, NodeProto, TensorProto

from edgeprune.errors import ParityError
from edgeprune.nn.onnx_proof_layers import layers
from edgeprune.nn.onnx_proof_runtime import in_integers
from edgeprune.nn.onnx_quantize_apart import step_before
from edgeprune.nn.onnx_quantize_plan import PASSING
from edgeprune.nn.onnx_view import View

# What ONNX Runtime's WeightBiasQuantization (1.21 and later, core/optimizer/qdq_transformer) looks at, and MatMul,
# which becomes a Gemm with the bias behind it.
TAKEN = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# What only moves values, or chooses among them: ONNX Runtime may move a DequantizeLinear through (QDQPropagation).
MOVING = frozenset((*PASSING, "Identity", "Dropout", "Expand", "Gather", "Tile"))


def guarded(model: ModelProto) -> ModelProto:
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
