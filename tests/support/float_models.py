"""Small ONNX models in float, for tests that quantize."""

from __future__ import annotations

from collections import Counter
from io import BytesIO
from typing import Any

import numpy as np
import onnx
import torch
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import nn

from edgeprune.quantize.prepare import prepare

SHAPE = (1, 3, 6, 6)


def model_of(
    nodes: list[Any],
    tensors: dict[str, Any],
    *,
    shape: tuple[Any, ...] = SHAPE,
    out: str = "out",
    opset: int = 18,
) -> ModelProto:
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(out, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in tensors.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = 9
    return model


def floats(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def kinds(model: ModelProto) -> dict[str, int]:
    return dict(Counter(node.op_type for node in model.graph.node))


def exported(module: nn.Module, shape: tuple[int, ...], opset: int = 18) -> ModelProto:
    file = BytesIO()
    torch.onnx.export(
        module.eval(), (torch.zeros(shape),), file, input_names=["input"], output_names=["out"],
        opset_version=opset, dynamo=False, training=torch.onnx.TrainingMode.PRESERVE, do_constant_folding=False,
    )  # fmt: skip
    return onnx.load_from_string(file.getvalue())


def residual(batch: int | str = 1) -> ModelProto:
    tensors = {
        "w": floats(8, 3, 3, 3),
        "v": floats(8, 8, 1, 1, seed=1),
        "b": floats(8, seed=2),
        "fc": floats(5, 8),
    }
    nodes = [
        helper.make_node("Conv", ["input", "w", "b"], ["a"], "a", pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["r"], "r"),
        helper.make_node("Conv", ["r", "v"], ["c"], "c"),
        helper.make_node("Add", ["c", "r"], ["s"], "s"),
        helper.make_node("GlobalAveragePool", ["s"], ["p"], "p"),
        helper.make_node("Flatten", ["p"], ["f"], "f"),
        helper.make_node("Gemm", ["f", "fc"], ["out"], "out", transB=1),
    ]
    return prepare(model_of(nodes, tensors, shape=(batch, 3, 6, 6)))


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand((count, 3, 6, 6), generator=torch.Generator().manual_seed(seed))


def attributes(node: NodeProto) -> dict[str, Any]:
    return {item.name: helper.get_attribute_value(item) for item in node.attribute}


def initializers(graph: GraphProto) -> dict[str, np.ndarray]:
    return {item.name: numpy_helper.to_array(item) for item in graph.initializer}
