"""Every convolution and matrix product of an ONNX graph: its work, its weights, and the precision it is written in."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper

from edgeprune.errors import ModelError, ParityError, UnsupportedModel
from edgeprune.onnx_graph.index import ONNX_ERRORS, View, title
from edgeprune.onnx_graph.qdq_constants import maker_of

Shape = tuple[int, ...]
CONVOLUTIONS = ("Conv", "ConvInteger", "QLinearConv", "ConvTranspose")
PRODUCTS = ("Gemm", "MatMul", "MatMulInteger", "QLinearMatMul")
RECURRENT = ("LSTM", "GRU", "RNN")
ATTENTION = ("Attention", "MultiHeadAttention")
MULTIPLYING = (*CONVOLUTIONS, *PRODUCTS, "Einsum", *RECURRENT, *ATTENTION)


def node_macs(node: NodeProto, shape_of: Callable[[str], Shape | None]) -> int | None:
    """Multiply-accumulates of a node for the whole batch; 0 for one that multiplies no two tensors in sums.

    Args:
        shape_of: value -> its shape; None where it is not known.
    """
    if node.op_type not in MULTIPLYING:
        return 0
    second = 3 if node.op_type.startswith("QLinear") else 1
    places = [node.input[0], *node.input[second : second + 2], node.output[0]]
    if node.op_type not in ("Einsum", *RECURRENT, *ATTENTION):
        places = [node.input[0], node.input[second], node.output[0]]
    if node.op_type == "Einsum":
        places = [*node.input, node.output[0]]
    shapes = [shape_of(name) for name in places]
    known = [shape for shape in shapes if shape is not None]
    return _macs(node, known) if len(known) == len(shapes) else None


def _macs(node: NodeProto, shapes: list[Shape]) -> int:
    first, second, made = shapes[0], shapes[1], shapes[-1]
    settings = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type in CONVOLUTIONS:
        return prod(first if node.op_type == "ConvTranspose" else made) * prod(second[1:])
    if node.op_type in PRODUCTS:
        return prod(made) * first[0 if settings.get("transA") else -1]
    if node.op_type == "Einsum":
        return _einsum(settings["equation"].decode(), shapes[:-1])
    if node.op_type in RECURRENT:
        return prod(first[:2]) * (prod(second) + prod(shapes[2]))
    if node.op_type == "Attention" and node.domain == "com.microsoft":  # with the weights of all three inside
        return prod(first[:2]) * prod(second) + 2 * first[1] * prod(made)
    return second[-2] * (prod(first) + prod(made))


def _einsum(equation: str, shapes: list[Shape]) -> int:
    if len(shapes) < 2:
        return 0
    sizes: dict[str, int] = {}
    for term, shape in zip(equation.replace(" ", "").partition("->")[0].split(","), shapes, strict=True):
        before, dots, after = term.partition("...")
        open_ = len(shape) - len(before) - len(after) if dots else 0
        labels = [
            *before,
            *(f".{i}" for i in range(-open_, 0)),
            *after,
        ]  # open dimensions end at the last one
        for label, size in zip(labels, shape, strict=True):
            sizes[label] = max(sizes.get(label, 1), size)
    return prod(sizes.values())


INT8_OPERATORS = ("Conv", "ConvTranspose", "Gemm", "MatMul")  # those that take int8

_BYTES = (TensorProto.INT8, TensorProto.UINT8)
# What may stand between a stored weight and the node that applies it.
_PASSING = ("DequantizeLinear", "QuantizeLinear", "Transpose", "Reshape", "Identity", "Cast")


@dataclass(frozen=True)
class Layer:
    """One product as the file has it.

    macs: for one image. weights: entries of its weight, 0 when both operands are activations. stored: the initializer
    that the weight is made from. low: in the precision that was asked for; why: else the reason.
    """

    name: str
    macs: int
    weights: int
    stored: str
    low: bool
    why: str = ""


def layers(view: View, precision: str) -> Iterator[Layer]:
    """All that multiplies in a graph, in its order, nodes without a name called after what they make."""
    for node in view.graph.node:
        if node.op_type in MULTIPLYING:
            stored = [_stored(view, name) for name in node.input[:2]]
            weight = stored[1] or (stored[0] if node.op_type in ("Gemm", "MatMul") else "")
            size = prod(view.initializers[weight].dims) if weight in view.initializers else 0
            why = _why_not(view, node, precision)
            yield Layer(title(node), _onnx_proof_layers_macs(view, node), size, weight, not why, why)


def _stored(view: View, value: str) -> str:
    while value not in view.initializers:
        node = view.producers.get(value)
        if node is None or node.op_type not in _PASSING:
            return ""
        value = node.input[0]
    return value


def _why_not(view: View, node: NodeProto, precision: str) -> str:
    if precision == "fp32":
        return "float32"
    if precision == "fp16":
        return _why_not_half(view, node)
    for name, what in zip(node.input, ("data", "weight"), strict=False):
        maker = maker_of(view, name, "DequantizeLinear")
        if maker is None:
            return f"its {what} does not come from a DequantizeLinear"
        if view.dtype(maker.input[0]) not in _BYTES:
            return f"its {what} has not 8 bits"
    return ""


def _why_not_half(view: View, node: NodeProto) -> str:
    for position, what in enumerate(("data", "weight")):
        name = node.input[position]
        if view.dtype(name) != TensorProto.FLOAT16:
            return f"its {what} is not float16"
        array = view.constant(name)
        if array is not None and not np.isfinite(array).all():
            raise ParityError(
                f"the weight {name} of {node.name} holds NaN or infinity in float16",
                "keep that node in float32",
            )
    return ""


def _onnx_proof_layers_macs(view: View, node: NodeProto) -> int:
    """Multiply-accumulates for one image: those of a whole batch, over its size."""
    total = node_macs(node, lambda name: _known(view, view.shape(name)))
    if not total:
        shapes = [view.shape(name) for name in (*node.input[:2], node.output[0])]
        raise UnsupportedModel(
            f"the shapes of {title(node)} are not known: {shapes[0]} with {shapes[1]} gives {shapes[2]}",
            "infer the shapes of the model first",
        )
    return total // _batch(view)


def _known(view: View, shape: tuple[int | None, ...]) -> tuple[int, ...]:
    """A shape with the batch for a free first dimension; another free one makes it empty of entries."""
    return tuple(
        (_batch(view) if i == 0 else 0) if size is None else size for i, size in enumerate(shape)
    ) or (0,)


def _batch(view: View) -> int:
    shape = view.shape(view.inputs[0])
    return (shape[0] if shape else None) or 1


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


def work_of(path: Path) -> tuple[Work, ...]:
    """The layers of an ONNX file in order; an open dimension counts as one."""
    try:
        graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    except ONNX_ERRORS as error:
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
        yield Work(node.name, node.op_type, _measure_work_macs(node, shapes), numbers)


def _measure_work_macs(node: onnx.NodeProto, shapes: Mapping[str, Sequence[int]]) -> int:
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
