"""Bias correction: what rounding the weights does to the mean of each output is taken off its bias.

Nagel, van Baalen, Blankevoort, Welling: Data-Free Quantization Through Weight Equalization and Bias Correction, ICCV
2019 (arXiv 1906.04721), section 4.2: E[W_q x] - E[W x] = (W_q - W) E[x], with the means of the input channels taken
from the activations that were seen instead of from batch-norm statistics. The means of what lies beside the image
(padding) are taken as those of the image, as in the paper.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, helper, numpy_helper

from edgeprune.errors import ParityError
from edgeprune.onnx_graph import (
    Array,
    View,
    attribute,
    copied,
    dequantized,
    maker_of,
    operand,
    parameters_of,
    unused,
)

if TYPE_CHECKING:
    from edgeprune.quantize.observers import Activations

_CORRECTED = ("Conv", "ConvTranspose", "Gemm")
_INT32 = np.iinfo(np.int32)
_Floats = npt.NDArray[np.float64]


def corrected(model: ModelProto, floats: ModelProto, seen: Activations) -> ModelProto:
    """A copy of a quantized model in which each output of each quantized layer has the mean of the float model's.

    The bias of a layer becomes b + (W - W_q) E[x], with b and W from the float model, so that doing it twice changes
    nothing more. An int32 bias keeps its scale; a layer without a bias gets one, of the kind its scheme asks for.

    Args:
        model: with explicit QuantizeLinear and DequantizeLinear; not changed. A Conv, ConvTranspose or Gemm is
            corrected when its weight comes from a DequantizeLinear of a constant.
        seen: the activations of `floats`; a layer whose input is not among them stays as it is.
    """
    copy = copied(model)
    originals = {node.name: node for node in floats.graph.node if node.name and node.op_type in _CORRECTED}
    known = View(floats)
    view = View(copy)
    for node in list(copy.graph.node):
        original = originals.get(node.name)
        if original is None or original.op_type != node.op_type:
            continue
        was, now = known.constant(original.input[1]), dequantized(view, node.input[1])
        if was is None or now is None or original.input[0] not in seen:
            continue
        if was.shape != now.shape:
            raise ParityError(
                f"the weight of {node.name} is {now.shape} in the quantized model and {was.shape} in the float one",
                "quantize the very model that is given as the float one",
            )
        error = _mean_error(node, was.astype(np.float64) - now, seen[original.input[0]].mean)
        if error is not None:
            bias = known.constant(operand(original, 2)) if operand(original, 2) else np.zeros(())
            if bias is not None and _set_bias(view, node, bias.astype(np.float64) + error):
                view = View(copy)
    return copy


def _mean_error(node: NodeProto, error: _Floats, mean: _Floats) -> _Floats | None:
    """(W - W_q) E[x] in what is added to the bias; None when the means are not those of the summed channels."""
    groups = int(attribute(node, "group", 1))
    if node.op_type == "Gemm":
        if attribute(node, "transA", 0) or not attribute(node, "beta", 1.0):
            return None
        rows = error if attribute(node, "transB", 0) else error.T
        factor = attribute(node, "alpha", 1.0) / attribute(node, "beta", 1.0)
        return factor * (rows @ mean) if rows.shape[1] == mean.size else None
    if node.op_type == "ConvTranspose":
        # (inputs, outputs of the group, kernel): with a stride an output meets one in so many of the kernel's entries.
        strides = attribute(node, "strides", [1] * (error.ndim - 2))
        split = error.reshape(groups, -1, *error.shape[1:]).sum(tuple(range(3, error.ndim + 1)))
        by_group = np.swapaxes(split, 1, 2) / np.prod(strides)
    else:
        by_group = error.sum(tuple(range(2, error.ndim))).reshape(groups, -1, error.shape[1])
    if by_group.shape[0] * by_group.shape[2] != mean.size:
        return None
    return np.einsum("goi,gi->go", by_group, mean.reshape(groups, -1)).ravel()


def _set_bias(view: View, node: NodeProto, bias: _Floats) -> bool:
    """Write a bias into the graph; gives whether the graph got new parts."""
    name = operand(node, 2)
    if not name:
        _add_bias(view, node, bias)
        return True
    maker = maker_of(view, name, "DequantizeLinear")
    stored = view.constant(name if maker is None else maker.input[0])
    if stored is None or stored.dtype.name not in ("float32", "int32"):
        return False
    if maker is None:
        return _store(view, node, 2, _shaped(bias, stored.shape).astype(np.float32))
    step = parameters_of(view, maker)
    return step is not None and _store(view, maker, 0, _rounded(_shaped(bias, stored.shape), step.scale))


def _shaped(bias: _Floats, shape: tuple[int, ...]) -> _Floats:
    return bias.reshape(shape) if bias.size == np.prod(shape) else bias.ravel()


def _store(view: View, node: NodeProto, position: int, array: Array) -> bool:
    """Make an array the constant input of a node; in a new initializer where others read the old one too."""
    name = node.input[position]
    if name in view.initializers and view.uses(name) == 1:
        view.initializers[name].CopyFrom(numpy_helper.from_array(array, name))
        return False
    fresh = unused(view, f"{name}.corrected")
    view.graph.initializer.append(numpy_helper.from_array(array, fresh))
    node.input[position] = fresh
    return True


def _add_bias(view: View, node: NodeProto, bias: _Floats) -> None:
    """Float, or where activations are unsigned int32 in steps of the input's times the weights', as kernels add it."""
    wish = f"{node.name}.bias"
    del node.input[2:]
    makers = [maker_of(view, name, "DequantizeLinear") for name in node.input]
    data, weight = (None if maker is None else parameters_of(view, maker) for maker in makers)
    if data is None or weight is None or data.zero.dtype != np.uint8:
        fresh = unused(view, wish)
        view.graph.initializer.append(numpy_helper.from_array(bias.astype(np.float32), fresh))
        node.input.append(fresh)
        return
    scale = np.broadcast_to((data.scale * weight.scale).ravel(), bias.shape).astype(np.float32)
    stored, step, fresh = (unused(view, f"{wish}{end}") for end in ("_quantized", "_scale", ""))
    view.graph.initializer.append(numpy_helper.from_array(_rounded(bias, scale), stored))
    view.graph.initializer.append(numpy_helper.from_array(scale, step))
    node.input.append(fresh)
    maker = helper.make_node("DequantizeLinear", [stored, step], [fresh], f"{fresh}_DequantizeLinear", axis=0)
    place = next(i for i, other in enumerate(view.graph.node) if other.output[0] == node.output[0])
    view.graph.node.insert(place, maker)


def _rounded(bias: _Floats, scale: Array) -> npt.NDArray[np.int32]:
    steps = np.rint(bias / scale.astype(np.float64).reshape(-1 if scale.size > 1 else ()))
    return np.clip(steps, _INT32.min, _INT32.max).astype(np.int32)
