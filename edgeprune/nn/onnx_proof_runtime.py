"""What ONNX Runtime makes of a Q/DQ graph: which of its products end up in integer kernels on this machine."""

from __future__ import annotations

import re
from collections.abc import Sequence

import onnx
import onnxruntime
from google.protobuf.message import DecodeError
from onnx import ModelProto

from edgeprune.codec import scratch_folder
from edgeprune.errors import UnsupportedModel
from edgeprune.nn.capture import reason
from edgeprune.nn.onnx_proof_layers import Layer
from edgeprune.nn.parity import ORT_ERRORS

# Kernels that multiply whole numbers.
INTEGER = frozenset(
    ("QLinearConv", "ConvInteger", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul",
     "QGemm")
)  # fmt: skip
# What ONNX Runtime adds to the name of a node that it moves into its own layout.
_MOVED = re.compile(r"(_token_\d+|_nhwc)+$")


def in_integers(model: ModelProto, low: Sequence[Layer]) -> list[Layer]:
    """Those of the layers that ONNX Runtime runs in integer kernels, found in the graph that it would run.

    Raises:
        UnsupportedModel: ONNX Runtime can't load the model.
    """
    graph = optimized(model).graph
    nodes = [node for node in graph.node if node.op_type in INTEGER]
    names = {_MOVED.sub("", node.name) for node in nodes}
    stored = {name for node in nodes for name in node.input}
    return [layer for layer in low if layer.name in names or (layer.stored and layer.stored in stored)]


def optimized(model: ModelProto) -> ModelProto:
    """The graph that ONNX Runtime's CPU provider runs: after all of its optimizations, operators of its own included.

    Raises:
        UnsupportedModel: it can't load the model.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    with scratch_folder() as folder:
        written = folder / "optimized.onnx"
        options.optimized_model_filepath = str(written)
        try:
            onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
            return onnx.load(written)
        except (*ORT_ERRORS, DecodeError) as error:
            raise UnsupportedModel(
                f"ONNX Runtime {onnxruntime.__version__} can't load the model: {reason(error)}"
            ) from error
