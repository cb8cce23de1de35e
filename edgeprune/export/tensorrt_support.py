"""What TensorRT will refuse in an ONNX file, found before the file travels to a board: opset, operators, types, Q/DQ.

The rules are those of NVIDIA's ONNX parser for explicitly quantized, strongly typed networks (onnx-tensorrt,
docs/operators.md): scales are constants, zero points are 0, 8-bit types are signed, and a bias is not quantized.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from edgeprune.errors import UnsupportedModel, UsageError

# The newest opset of each version's parser, from the first version that has it.
OPSETS = ((802, 13), (805, 17), (1000, 20), (1009, 22), (1013, 24), (1100, 25))
LEAST_OPSET = 9
_DOMAINS = ("", "ai.onnx")
# ONNX Runtime's way to write quantized layers; TensorRT takes Q/DQ pairs round float ones.
_QUANTIZED = frozenset({"ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul"})
_TYPES: dict[int, str] = {
    TensorProto.DOUBLE: "float64", TensorProto.COMPLEX64: "complex64", TensorProto.COMPLEX128: "complex128",
    TensorProto.STRING: "string", TensorProto.UINT16: "uint16", TensorProto.UINT32: "uint32",
    TensorProto.UINT64: "uint64", TensorProto.INT16: "int16",
}  # fmt: skip
_EIGHT_BITS = {TensorProto.INT8, TensorProto.FLOAT8E4M3FN}


def newest_opset(version: str) -> int:
    """The newest opset that a version of TensorRT reads, as "10.3" or "10.13.3.9"."""
    match = re.match(r"^(\d+)\.(\d+)", version)
    number = int(match.group(1)) * 100 + int(match.group(2)) if match else 0
    known = [opset for first, opset in OPSETS if number >= first]
    if not known:
        raise UsageError(f"TensorRT {version!r} is not known; accepted: 8.2 and newer, as in '10.3'")
    return known[-1]


def check_for_tensorrt(model: ModelProto, version: str) -> None:
    """Refuse what a version of TensorRT can't read, naming the node or the tensor.

    Raises:
        UnsupportedModel: the opset, an operator, a type, a scale or a zero point is not one that it takes.
    """
    newest = newest_opset(version)
    opset = next((o.version for o in model.opset_import if o.domain in _DOMAINS), 0)
    if not LEAST_OPSET <= opset <= newest:
        raise UnsupportedModel(
            f"the file has opset {opset}, TensorRT {version} reads {LEAST_OPSET} to {newest}",
            f"export it again with --set export.opset={newest}",
        )
    graph = model.graph
    constants = {t.name: t for t in graph.initializer}
    constants |= dict(_constants(graph))
    _check_inputs(graph, constants)
    for tensor in constants.values():
        refused = _TYPES.get(tensor.data_type)
        if refused:
            raise UnsupportedModel(
                f"the tensor {tensor.name!r} is {refused}; TensorRT takes float32, float16, int8, "
                "int32, int64 and bool"
            )
    for node in graph.node:
        _check_node(node, constants)


def _check_inputs(graph: GraphProto, constants: Mapping[str, TensorProto]) -> None:
    inputs = [v for v in graph.input if v.name not in constants]
    for value in inputs:
        dims = value.type.tensor_type.shape.dim
        free = [i for i, dim in enumerate(dims) if not dim.dim_value]
        if set(free) - {0}:
            raise UnsupportedModel(
                f"dimension {free[-1]} of the input {value.name!r} is open; only the batch may be",
                "export it again with a fixed height and width",
            )
    kinds = [v.type.tensor_type.elem_type for v in inputs]
    if len(inputs) != 1 or kinds[0] not in (TensorProto.FLOAT, TensorProto.FLOAT16):
        named = ", ".join(
            f"{v.name} ({TensorProto.DataType.Name(v.type.tensor_type.elem_type)})" for v in inputs
        )
        raise UnsupportedModel(
            f"the file has the inputs {named or 'none'}; accepted: one of float32 or float16"
        )


def _check_node(node: NodeProto, constants: Mapping[str, TensorProto]) -> None:
    if node.domain not in _DOMAINS:
        raise UnsupportedModel(
            f"{_named(node)} is of the domain {node.domain!r}, which TensorRT does not know",
            "export it without it",
        )
    if node.op_type in _QUANTIZED:
        raise UnsupportedModel(
            f"{_named(node)} is not read by TensorRT", "quantize with Q/DQ pairs: quantize.scheme=s8"
        )
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        _check_scale(node, constants)
        _check_zero(node, constants)
    if (
        node.op_type.startswith("Reduce")
        and len(node.input) > 1
        and node.input[1]
        and node.input[1] not in constants
    ):
        raise UnsupportedModel(f"the axes of {_named(node)} are computed; TensorRT wants them as a constant")


def _check_scale(node: NodeProto, constants: Mapping[str, TensorProto]) -> None:
    scale = constants.get(node.input[1]) if len(node.input) > 1 else None
    if scale is None:
        raise UnsupportedModel(f"the scale of {_named(node)} is not a constant, as TensorRT wants it")
    values = numpy_helper.to_array(scale).astype(np.float64)
    wrong = values[~(np.isfinite(values) & (values > 0))]
    if wrong.size:
        raise UnsupportedModel(
            f"the scale of {_named(node)} has {wrong.flat[0]}; accepted: finite numbers above 0"
        )


def _check_zero(node: NodeProto, constants: Mapping[str, TensorProto]) -> None:
    zero = constants.get(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    data = constants.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
    # Without a zero point QuantizeLinear makes uint8, unless it says its output_dtype.
    said = next((a.i for a in node.attribute if a.name == "output_dtype" and a.i), TensorProto.UINT8)
    kind = zero.data_type if zero is not None else data.data_type if data is not None else said
    if node.op_type == "DequantizeLinear" and zero is None and data is None:
        return  # its type is that of the QuantizeLinear before it, which is looked at itself
    if kind == TensorProto.INT32:
        raise UnsupportedModel(f"{_named(node)} is a quantized bias; TensorRT wants it in floating point")
    if kind not in _EIGHT_BITS:
        name = TensorProto.DataType.Name(kind).lower()
        raise UnsupportedModel(
            f"{_named(node)} is quantized to {name}; TensorRT takes signed int8 alone",
            "quantize with quantize.scheme=s8",
        )
    if zero is not None and np.any(numpy_helper.to_array(zero).astype(np.float32)):
        value = numpy_helper.to_array(zero).astype(np.float32)
        raise UnsupportedModel(
            f"the zero point of {_named(node)} is {value[value != 0].flat[0]:g}; TensorRT takes 0 alone",
            "quantize with quantize.scheme=s8",
        )


def _constants(graph: GraphProto) -> Iterator[tuple[str, TensorProto]]:
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value":
                yield node.output[0], attribute.t


def _named(node: NodeProto) -> str:
    return f"{node.name or node.output[0]!r} ({node.op_type})"
