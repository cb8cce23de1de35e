"""The constants of QuantizeLinear and DequantizeLinear nodes, and what a quantized constant stands for."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import NodeProto, TensorProto, helper

from edgeprune.onnx_graph.index import Array, View, attribute, operand


@dataclass(frozen=True)
class QuantizationParameters:
    """How wide a step is and where zero lies: one for all entries, or one for each place along an axis.

    scale: as stored; () or (C,). zero: of the quantized type; like scale, or ().
    """

    scale: Array
    zero: Array
    axis: int

    def whole(self, array: Array) -> Array:
        """Entries as QuantizeLinear rounds them: to even, saturated; of the type of `zero`."""
        limits: Any = np.iinfo(self.zero.dtype)
        steps = np.rint(array / self._along(array, self.scale)) + self._along(array, self.zero)
        return np.clip(steps, limits.min, limits.max).astype(self.zero.dtype)

    def _along(self, array: Array, values: Array) -> npt.NDArray[np.float64]:
        wide = values.astype(np.float64)
        if wide.size == 1:
            return wide.reshape(())
        return wide.reshape([-1 if i == self.axis % array.ndim else 1 for i in range(array.ndim)])


def parameters_of(view: View, node: NodeProto) -> QuantizationParameters | None:
    """The step of a QuantizeLinear or DequantizeLinear; None when it is computed and not constant."""
    scale = view.constant(node.input[1])
    zero = view.constant(operand(node, 2)) if operand(node, 2) else _no_zero(view, node)
    if scale is None or zero is None:
        return None
    return QuantizationParameters(scale, zero, int(attribute(node, "axis", 1)))


def maker_of(view: View, value: str, op: str) -> NodeProto | None:
    """The node that makes a value when it is one of that kind."""
    node = view.producers.get(value)
    return node if node is not None and node.op_type == op else None


def quantized_constant(view: View, node: NodeProto) -> Array | None:
    """The whole numbers that a DequantizeLinear turns into reals, when no input of the model changes them.

    They are stored as such, or as floats that a QuantizeLinear rounds.
    """
    stored = view.constant(node.input[0])
    rounding = maker_of(view, node.input[0], "QuantizeLinear")
    if stored is not None or rounding is None:
        return stored
    floats, step = view.constant(rounding.input[0]), parameters_of(view, rounding)
    return None if floats is None or step is None else step.whole(floats)


def _no_zero(view: View, node: NodeProto) -> Array:
    value = node.input[0] if node.op_type == "DequantizeLinear" else node.output[0]
    stored = view.initializers.get(value)
    kind = stored.data_type if stored is not None else view.dtype(value)
    return np.zeros((), helper.tensor_dtype_to_np_dtype(kind or TensorProto.UINT8))
