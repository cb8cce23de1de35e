"""Every convolution and matrix product of an ONNX graph: its work, its weights, and the precision it is written in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import numpy as np
from onnx import NodeProto, TensorProto

from edgeprune.errors import ParityError, UnsupportedModel
from edgeprune.nn.onnx_steps import maker_of
from edgeprune.nn.onnx_view import View, title
from edgeprune.nn.onnx_work import MULTIPLYING, node_macs

PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")  # those that take int8
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
    """All that multiplies in a graph, in its order, nodes without a name called after what they make.

    Raises:
        ParityError: a float16 weight holds NaN or infinity.
        UnsupportedModel: the shape of one is not known.
    """
    for node in view.graph.node:
        if node.op_type in MULTIPLYING:
            stored = [_stored(view, name) for name in node.input[:2]]
            weight = stored[1] or (stored[0] if node.op_type in ("Gemm", "MatMul") else "")
            size = prod(view.initializers[weight].dims) if weight in view.initializers else 0
            why = _why_not(view, node, precision)
            yield Layer(title(node), _macs(view, node), size, weight, not why, why)


def _stored(view: View, value: str) -> str:
    """The initializer that a value is made from without any input of the model, or ""."""
    while value not in view.initializers:
        node = view.producers.get(value)
        if node is None or node.op_type not in _PASSING:
            return ""
        value = node.input[0]
    return value


def _why_not(view: View, node: NodeProto, precision: str) -> str:
    """Why a product is not in a precision; "" when it is."""
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


def _macs(view: View, node: NodeProto) -> int:
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
