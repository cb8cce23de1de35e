"""What TensorRT will refuse in an ONNX file, found before the file is sent to a board: opset, operators, types, Q/DQ.

The rules are those of NVIDIA's ONNX parser for explicitly quantized, strongly typed networks (onnx-tensorrt,
docs/operators.md): scales are constants, zero points are 0, 8-bit types are signed, and a bias is not quantized.
"""

import re
from collections.abc import Mapping

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from edgeprune.errors import UnsupportedModel, UsageError
from edgeprune.onnx_graph import attribute, operand, opset_of, title

# The newest opset of each version's parser, from the first version that has it.
OPSETS = ((802, 13), (805, 17), (1000, 20), (1009, 22), (1013, 24), (1100, 25))
LEAST_OPSET = 9
# ONNX Runtime's way to write quantized layers; TensorRT takes Q/DQ pairs around float ones.
_QUANTIZED = frozenset({"ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul"})
_TYPES: dict[int, str] = {
    TensorProto.DOUBLE: "float64", TensorProto.COMPLEX64: "complex64", TensorProto.COMPLEX128: "complex128",
    TensorProto.STRING: "string", TensorProto.UINT16: "uint16", TensorProto.UINT32: "uint32",
    TensorProto.UINT64: "uint64", TensorProto.INT16: "int16",
}  # fmt: skip
_EIGHT_BITS = {TensorProto.INT8, TensorProto.FLOAT8E4M3FN}
_SIGNED_SCHEME = "quantize with quantize.scheme=s8"


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
        UnsupportedModel: it does not take the opset, an operator, a type, a scale or a zero point.
    """
    newest, opset = newest_opset(version), opset_of(model)
    if not LEAST_OPSET <= opset <= newest:
        raise UnsupportedModel(
            f"the file has opset {opset}, TensorRT {version} reads {LEAST_OPSET} to {newest}",
            f"export it again with --set export.opset={newest}",
        )
    graph = model.graph
    constants = {t.name: t for t in graph.initializer}
    for node in graph.node:
        value = attribute(node, "value", None)
        if node.op_type == "Constant" and isinstance(value, TensorProto):
            constants[node.output[0]] = value
    _check_inputs(graph, constants)
    for name, tensor in constants.items():
        refused = _TYPES.get(tensor.data_type)
        if refused:
            raise UnsupportedModel(
                f"the tensor {name!r} is {refused}; TensorRT takes float32, float16, int8, int32, int64 and bool"
            )
    for node in graph.node:
        _check_node(node, constants)


def _check_inputs(graph: GraphProto, constants: Mapping[str, TensorProto]) -> None:
    inputs = [v for v in graph.input if v.name not in constants]
    for value in inputs:
        free = [i for i, dim in enumerate(value.type.tensor_type.shape.dim) if not dim.dim_value]
        if set(free) - {0}:
            raise UnsupportedModel(
                f"dimension {free[-1]} of the input {value.name!r} is open; only the batch may be",
                "export it again with a fixed height and width",
            )
    kinds = [v.type.tensor_type.elem_type for v in inputs]
    if len(inputs) != 1 or kinds[0] not in (TensorProto.FLOAT, TensorProto.FLOAT16):
        named = ", ".join(
            f"{v.name} ({TensorProto.DataType.Name(kind)})" for v, kind in zip(inputs, kinds, strict=True)
        )
        raise UnsupportedModel(
            f"the file has the inputs {named or 'none'}; accepted: one of float32 or float16"
        )


def _check_node(node: NodeProto, constants: Mapping[str, TensorProto]) -> None:
    if node.domain not in ("", "ai.onnx"):
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
    axes = operand(node, 1)
    if node.op_type.startswith("Reduce") and axes and axes not in constants:
        raise UnsupportedModel(f"the axes of {_named(node)} are computed; TensorRT wants them as a constant")


def _check_scale(node: NodeProto, constants: Mapping[str, TensorProto]) -> None:
    scale = constants.get(operand(node, 1))
    if scale is None:
        raise UnsupportedModel(f"the scale of {_named(node)} is not a constant, as TensorRT wants it")
    values = numpy_helper.to_array(scale).astype(np.float64)
    wrong = values[~(np.isfinite(values) & (values > 0))]
    if wrong.size:
        raise UnsupportedModel(
            f"the scale of {_named(node)} has {wrong.flat[0]}; accepted: finite numbers above 0"
        )


def _check_zero(node: NodeProto, constants: Mapping[str, TensorProto]) -> None:
    zero = constants.get(operand(node, 2))
    data = constants.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
    typed = data if zero is None else zero
    if node.op_type == "DequantizeLinear" and typed is None:
        return  # its type is that of the QuantizeLinear before it, which is checked itself
    # QuantizeLinear gives uint8 where neither a zero point nor output_dtype says otherwise.
    kind = typed.data_type if typed is not None else attribute(node, "output_dtype", 0) or TensorProto.UINT8
    if kind == TensorProto.INT32:
        raise UnsupportedModel(f"{_named(node)} is a quantized bias; TensorRT wants it in floating point")
    if kind not in _EIGHT_BITS:
        name = TensorProto.DataType.Name(kind).lower()
        raise UnsupportedModel(
            f"{_named(node)} is quantized to {name}; TensorRT takes signed int8 alone", _SIGNED_SCHEME
        )
    value = numpy_helper.to_array(zero).astype(np.float32) if zero is not None else np.zeros(1)
    if value.any():
        raise UnsupportedModel(
            f"the zero point of {_named(node)} is {value[value != 0].flat[0]:g}; TensorRT takes 0 alone",
            _SIGNED_SCHEME,
        )


def _named(node: NodeProto) -> str:
    return f"{title(node)!r} ({node.op_type})"
