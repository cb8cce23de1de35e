"""The work of a file, counted: multiply-accumulates and bytes of each of its layers, fused as runtimes fuse them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from edgeprune.errors import ModelError
from edgeprune.nn.onnx_work import node_macs

# Bytes of one number.
WIDTH = {"fp32": 4, "fp16": 2, "int8": 1}
# What every runtime makes a part of the layer before it: pointwise functions, and what only changes type or shape.
_FUSED = frozenset({
    "Add", "BatchNormalization", "Cast", "Clip", "DequantizeLinear", "Elu", "Flatten", "HardSigmoid", "HardSwish",
    "Identity", "LeakyRelu", "Mul", "PRelu", "QuantizeLinear", "Relu", "Reshape", "Sigmoid", "Squeeze", "Unsqueeze",
})  # fmt: skip


@dataclass(frozen=True)
class Work:
    """One layer for one image: multiply-accumulates, and numbers read and written, each once."""

    name: str
    op: str
    macs: int
    numbers: int


def work(path: Path) -> tuple[Work, ...]:
    """The layers of an ONNX file in order; an open dimension counts as one.

    Raises:
        ModelError: it is not a readable ONNX file, or a convolution's or a matrix product's shape can't be told.
    """
    try:
        graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    except (OSError, DecodeError, ValueError, onnx.shape_inference.InferenceError) as error:
        raise ModelError(f"{path} is not a readable ONNX file: {error}") from error
    shapes = dict(_shapes(graph))
    weights = {tensor.name for tensor in graph.initializer}
    made = {out: node for node in graph.node for out in node.output}
    return tuple(_layers(graph, shapes, weights, made))


def _layers(
    graph: onnx.GraphProto,
    shapes: Mapping[str, Sequence[int]],
    weights: set[str],
    made: Mapping[str, onnx.NodeProto],
) -> Iterator[Work]:
    for node in graph.node:
        if node.op_type == "Constant" or all(name in weights for name in node.input):
            continue
        inputs = [n for n in node.input if n and n not in weights]
        if node.op_type in _FUSED and any(name in made for name in inputs):
            # The first value stays where it is; a second, as of a residual sum, is read.
            extra = sum(_size(shapes, name) for name in inputs[1:])
            if extra:
                yield Work(node.name, node.op_type, 0, extra)
            continue
        numbers = sum(_size(shapes, name) for name in {*node.input, *node.output} if name)
        yield Work(node.name, node.op_type, _macs(node, shapes), numbers)


def _macs(node: onnx.NodeProto, shapes: Mapping[str, Sequence[int]]) -> int:
    macs = node_macs(node, lambda name: tuple(shapes[name]) if name in shapes else None)
    if macs is None:
        raise ModelError(
            f"the shape of {node.name!r} ({node.op_type}) can't be told",
            "export the file again, with fixed H and W",
        )
    return macs


def _shapes(graph: onnx.GraphProto) -> Iterator[tuple[str, tuple[int, ...]]]:
    for tensor in graph.initializer:
        yield tensor.name, tuple(tensor.dims)
    for value in (*graph.input, *graph.value_info, *graph.output):
        dims = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape"):
            yield value.name, tuple(d.dim_value or 1 for d in dims)


def _size(shapes: Mapping[str, Sequence[int]], name: str) -> int:
    return prod(shapes[name]) if name in shapes else 0
