"""Why a node of an ONNX graph must stay in float32 when the rest becomes float16."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto

from edgeprune.nn.onnx_view import View, attribute, captured, title

if TYPE_CHECKING:
    from edgeprune.nn.activations import Activations

FLOAT, HALF = int(TensorProto.FLOAT), int(TensorProto.FLOAT16)
# Images that were not seen may go further than those that were.
HEADROOM = 2.0
LARGEST, SMALLEST_NORMAL = 65504.0, 2.0**-14
# Rounding to float16 changes each entry by at most 2**-11 of it, unless it is so small that digits are lost.
LOST = 1e-3
# What raises to powers, multiplies many numbers or takes the inverse of small ones inside: the largest may not fit
# even where the result does, and the relative error grows.
SENSITIVE = frozenset(
    ("Softmax", "LogSoftmax", "Exp", "Log", "Pow", "Softplus", "LayerNormalization", "InstanceNormalization",
     "GroupNormalization", "RMSNormalization", "LpNormalization", "MeanVarianceNormalization", "LRN", "ReduceL2",
     "ReduceSumSquare", "ReduceProd", "ReduceLogSum", "ReduceLogSumExp", "GlobalLpPool", "LpPool", "CumSum")
)  # fmt: skip
_SUMMING = frozenset(("ReduceMean", "ReduceSum", "ReduceL1", "GlobalAveragePool", "AveragePool"))
# These read a value of any type, and what they give does not depend on it.
_INDIFFERENT = frozenset(("Shape", "Size"))
_STANDARD = ("", "ai.onnx")
# What these make has the type that an attribute says.
_TOLD = frozenset(("Cast", "ConstantOfShape"))
_FLOAT_TYPE, _HALF_TYPE = "tensor(float)", "tensor(float16)"


class Reasons:
    """Looks at the nodes of one graph."""

    def __init__(self, view: View, seen: Activations, skip: Collection[str]) -> None:
        """Look at `view` with what its activations were, and with nodes to leave alone."""
        self.view, self.seen, self.skip = view, seen, frozenset(skip)
        self.inside = {name: node.name for node in view.graph.node for name in captured(node)}

    def of(self, node: NodeProto) -> str:
        """Why a node stays float32; "" when it becomes float16, or has to do with no floats at all."""
        values = [name for name in (*node.input, *node.output) if name]
        unknown = next((name for name in values if not self.view.dtype(name)), "")
        if unknown and node.domain in _STANDARD:
            return f"the type of {unknown} is not known"
        if not unknown and not any(self.view.dtype(name) == FLOAT for name in values):
            return ""
        return next((why for why in self._found(node) if why), "")

    def _found(self, node: NodeProto) -> Iterator[str]:
        if title(node) in self.skip:
            yield "asked for"
        if any(item.HasField("g") or item.graphs for item in node.attribute):
            yield f"{node.op_type} holds a graph of its own"
        yield next((f"read inside of {self.inside[n]}" for n in node.output if n in self.inside), "")
        yield _unknown(self.view, node)
        if node.op_type in SENSITIVE:
            yield f"{node.op_type} loses digits in float16"
        yield self._summing(node)
        for name in dict.fromkeys((*node.input, *node.output)):
            yield self._out_of_range(name)
        for name in node.input:
            yield self._rounded(name)

    def _largest(self, name: str) -> float | None:
        seen = self.seen.get(name)
        return None if seen is None else max(abs(seen.low), abs(seen.high))

    def _out_of_range(self, name: str) -> str:
        largest = self._largest(name)
        if largest is None or largest == 0.0:
            return ""
        if not largest <= LARGEST / HEADROOM:
            return f"{name} reached {largest:.3g}; float16 ends at {LARGEST:.0f}"
        if largest < SMALLEST_NORMAL:
            return f"{name} never rose above {largest:.3g}; float16 loses digits below {SMALLEST_NORMAL:.3g}"
        return ""

    def _summing(self, node: NodeProto) -> str:
        largest = self._largest(node.input[0]) if node.op_type in _SUMMING else None
        if largest is None:
            return ""
        count = self._summed(node)
        if count * largest <= LARGEST / HEADROOM:
            return ""
        return f"{node.op_type} sums {count} entries of up to {largest:.3g}; float16 ends at {LARGEST:.0f}"

    def _summed(self, node: NodeProto) -> int:
        """How many entries make one of the result."""
        if node.op_type == "AveragePool":
            return prod(attribute(node, "kernel_shape", ()))
        before, after = self.view.shape(node.input[0]), self.view.shape(node.output[0])
        return max(1, prod(size or 1 for size in before) // max(1, prod(size or 1 for size in after)))

    def _rounded(self, name: str) -> str:
        array = self.view.constant(name) if name in self.view.initializers else None
        if array is None or array.dtype != np.float32 or not np.isfinite(array).all():
            return ""
        largest = float(np.abs(array).max(initial=0.0))
        if largest > LARGEST:
            return f"{name} holds {largest:.3g}; float16 ends at {LARGEST:.0f}"
        exact = array.astype(np.float64)
        change, norm = np.linalg.norm(exact - array.astype(np.float16)), np.linalg.norm(exact)
        if change > LOST * norm:
            return f"rounding {name} (at most {largest:.3g}) to float16 changes it by {100 * change / norm:.2g} %"
        return ""


def needs(view: View, node: NodeProto, kind: int) -> list[int]:
    """The type in which a node of a kind wants each of its inputs, where that is a float: 0 for any."""
    if node.op_type in _INDIFFERENT:
        return [0] * len(node.input)
    schema = _schema(view, node)
    if schema is None:
        return [kind] * len(node.input)
    formal = schema.inputs
    types = [formal[min(i, len(formal) - 1)].type_str for i in range(len(node.input))]
    return [FLOAT if name == _FLOAT_TYPE else kind for name in types]


def _unknown(view: View, node: NodeProto) -> str:
    """Why ONNX has no float16 form of a node."""
    schema = _schema(view, node)
    if schema is None:
        return f"{node.op_type} is no standard operator"
    allowed = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}
    for values, formal in ((node.input, schema.inputs), (node.output, schema.outputs)):
        for i, name in enumerate(values):
            kind = formal[min(i, len(formal) - 1)].type_str
            if view.dtype(name) == FLOAT and kind != _FLOAT_TYPE and _HALF_TYPE not in allowed.get(kind, ()):
                return f"ONNX has no float16 {node.op_type}"
    if node.op_type not in _TOLD and not _follows(view, node, schema):
        return f"{node.op_type} makes float32 of its own"
    return ""


def _follows(view: View, node: NodeProto, schema: Any) -> bool:
    """Whether the type of each float that a node makes is that of a float that it reads."""
    read, made = (
        {
            formal[min(i, len(formal) - 1)].type_str
            for i, name in enumerate(values)
            if view.dtype(name) == FLOAT
        }
        for values, formal in ((node.input, schema.inputs), (node.output, schema.outputs))
    )
    return made <= read


def _schema(view: View, node: NodeProto) -> Any:
    version = next((o.version for o in view.model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if node.domain not in _STANDARD or not onnx.defs.has(node.op_type):
        return None
    return onnx.defs.get_schema(node.op_type, version)
