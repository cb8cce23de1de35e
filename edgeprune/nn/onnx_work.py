"""Multiply-accumulates of one node of an ONNX graph, whatever it multiplies; the only count of them.

| operator | multiply-accumulates |
|---|---|
| Conv, ConvInteger, QLinearConv | outputs x entries of a filter |
| ConvTranspose | inputs x entries of a filter |
| Gemm, MatMul, MatMulInteger, QLinearMatMul | outputs x length of the sum |
| Einsum of two operands or more | product of the sizes of all its indices |
| LSTM, GRU, RNN | steps x images x entries of both weights |
| Attention, MultiHeadAttention | keys x (entries of the queries + of the output), and the weights where it has them |
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

from onnx import NodeProto, helper

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

    Returns:
        None where a shape that counts is not known.
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
