"""fp16: a graph in float16, but for the nodes that must stay in float32, and why they must."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from copy import deepcopy
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from edgeprune.errors import UnsupportedModel
from edgeprune.models import reason
from edgeprune.onnx_graph import ONNX_ERRORS, View, attribute, captured, copied, opset_of, title, unused
from edgeprune.quantize.evaluation import FloatBaseline
from edgeprune.quantize.int8 import fall_back
from edgeprune.quantize.job import Built, Job
from edgeprune.quantize.prepare import lift_constants

if TYPE_CHECKING:
    from edgeprune.quantize.observers import Activations

NAME = "fp16"
FLOAT, HALF = int(TensorProto.FLOAT), int(TensorProto.FLOAT16)
# The activations of other images may be larger than those of the observed ones.
HEADROOM = 2.0
LARGEST, SMALLEST_NORMAL = 65504.0, 2.0**-14
# Rounding to float16 changes each entry by at most 2**-11 of it, unless it is so small that digits are lost.
LOST = 1e-3
# These raise to powers, multiply many numbers or invert small ones inside: the largest may not fit even where the
# result does, and the relative error grows.
SENSITIVE = frozenset(
    ("Softmax", "LogSoftmax", "Exp", "Log", "Pow", "Softplus", "LayerNormalization", "InstanceNormalization",
     "GroupNormalization", "RMSNormalization", "LpNormalization", "MeanVarianceNormalization", "LRN", "ReduceL2",
     "ReduceSumSquare", "ReduceProd", "ReduceLogSum", "ReduceLogSumExp", "GlobalLpPool", "LpPool", "CumSum")
)  # fmt: skip
_SUMMING = frozenset(("ReduceMean", "ReduceSum", "ReduceL1", "GlobalAveragePool", "AveragePool"))
# They read a value of any type, and their output does not depend on it.
_INDIFFERENT = frozenset(("Shape", "Size"))
# An attribute has the type of their output.
_TYPED = frozenset(("Cast", "ConstantOfShape"))
_STANDARD = ("", "ai.onnx")
_FLOAT_TYPE, _HALF_TYPE = "tensor(float)", "tensor(float16)"
_TAGS = {FLOAT: "fp32", HALF: "fp16"}


def build(floats: FloatBaseline, job: Job) -> Built:
    """The network in fp16; its loss may still be above the tolerance."""
    seen = floats.seen(floats.model, "the network")

    def made(skip: tuple[str, ...]) -> ModelProto:
        return half(floats.model, seen, skip=(*floats.skipped, *skip))[0]

    job.log(f"quantize: to fp16, judged on {floats.evaluation.clean} images")
    judgement, fallback = floats.judge(NAME, (), lambda: made(())), dict[str, float]()
    if judgement.loss > job.table.tolerance and len(floats.layers) > 1:
        job.log(f"quantize: fp16 loses {100 * judgement.loss:.2f} points; find the layers that do")
        fallback, judgement = fall_back(floats, NAME, made, job.table.tolerance)
    model, kept = half(floats.model, seen, skip=(*floats.skipped, *fallback))
    kept = {node: why for node, why in kept.items() if node not in fallback}
    kept |= dict.fromkeys(floats.skipped, "asked for with quantize.skip")
    return Built("fp16", NAME, model, floats.model, judgement, {}, fallback, kept)


def half(
    model: ModelProto, seen: Activations, *, skip: Collection[str] = ()
) -> tuple[ModelProto, dict[str, str]]:
    """Convert a graph to float16; its inputs and outputs stay float32.

    A node stays float32 when it is in `skip`; when ONNX has it for float32 only, or it has a body; when it squares,
    exponentiates or normalizes; when one of its values went above half of what float16 can hold, or never rose above
    where float16 loses digits; when it sums so many entries that the sum may not fit; or when rounding its weight
    changes that by more than 0.1 %.

    Args:
        model: float32; stays as it is.
        seen: the activations of `model`; those that are missing are taken to be within range.

    Returns:
        The float16 graph, and {node that stays float32: why}, in the order of the graph.
    """
    copy = copied(model)
    lift_constants(copy)
    view = View(copy)
    reasons = _Reasons(view, seen, skip)
    nodes = list(copy.graph.node)
    why = [reasons.of(node) for node in nodes]
    _Converter(view, nodes).run([FLOAT if found else HALF for found in why])
    del copy.graph.value_info[:]
    try:
        inferred = onnx.shape_inference.infer_shapes(copy, check_type=True, strict_mode=True)
        onnx.checker.check_model(inferred, full_check=True)
    except ONNX_ERRORS as error:
        raise UnsupportedModel(f"the float16 graph is no valid ONNX: {reason(error)}") from error
    return inferred, {title(node): found for node, found in zip(nodes, why, strict=True) if found}


class _Reasons:
    def __init__(self, view: View, seen: Activations, skip: Collection[str]) -> None:
        self.view, self.seen, self.skip = view, seen, frozenset(skip)
        self.inside = {name: node.name for node in view.graph.node for name in captured(node)}

    def of(self, node: NodeProto) -> str:
        """Why a node stays float32; "" when it becomes float16, or has no floats at all."""
        values = [name for name in (*node.input, *node.output) if name]
        unknown = next((name for name in values if not self.view.dtype(name)), "")
        if unknown and node.domain in _STANDARD:
            return f"the type of {unknown} is not known"
        if not unknown and not any(self.view.dtype(name) == FLOAT for name in values):
            return ""
        return next(filter(None, self._all(node)), "")

    def _all(self, node: NodeProto) -> Iterator[str]:
        if title(node) in self.skip:
            yield "asked for"
        if any(item.HasField("g") or item.graphs for item in node.attribute):
            yield f"{node.op_type} holds a graph of its own"
        yield next((f"read inside of {self.inside[n]}" for n in node.output if n in self.inside), "")
        yield _no_half_form(self.view, node)
        if node.op_type in SENSITIVE:
            yield f"{node.op_type} loses digits in float16"
        yield self._summing(node)
        for name in dict.fromkeys((*node.input, *node.output)):
            yield self._out_of_range(name)
        for name in node.input:
            yield self._rounded(name)

    def _largest(self, name: str) -> float:
        seen = self.seen.get(name)
        return 0.0 if seen is None else max(abs(seen.low), abs(seen.high))

    def _out_of_range(self, name: str) -> str:
        largest = self._largest(name)
        if not largest <= LARGEST / HEADROOM:
            return f"{name} reached {largest:.3g}; float16 ends at {LARGEST:.0f}"
        if 0.0 < largest < SMALLEST_NORMAL:
            return f"{name} never rose above {largest:.3g}; float16 loses digits below {SMALLEST_NORMAL:.3g}"
        return ""

    def _summing(self, node: NodeProto) -> str:
        if node.op_type not in _SUMMING:
            return ""
        largest = self._largest(node.input[0])
        if node.op_type == "AveragePool":
            count = prod(attribute(node, "kernel_shape", ()))
        else:
            before, after = (
                prod(s or 1 for s in self.view.shape(n)) for n in (node.input[0], node.output[0])
            )
            count = max(1, before // max(1, after))
        if count * largest <= LARGEST / HEADROOM:
            return ""
        return f"{node.op_type} sums {count} entries of up to {largest:.3g}; float16 ends at {LARGEST:.0f}"

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


def _no_half_form(view: View, node: NodeProto) -> str:
    schema = _schema(view, node)
    if schema is None:
        return f"{node.op_type} is no standard operator"
    allowed = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}
    read, made = (
        {kind for name, kind in zip(names, _types(formal, names), strict=True) if view.dtype(name) == FLOAT}
        for names, formal in ((node.input, schema.inputs), (node.output, schema.outputs))
    )
    if any(kind != _FLOAT_TYPE and _HALF_TYPE not in allowed.get(kind, ()) for kind in read | made):
        return f"ONNX has no float16 {node.op_type}"
    if node.op_type not in _TYPED and not made <= read:
        return f"{node.op_type} makes float32 of its own"
    return ""


def _types(formal: Sequence[Any], names: Sequence[str]) -> list[str]:
    """The types of a node's inputs or outputs in its schema, where the last one may repeat."""
    return [formal[min(i, len(formal) - 1)].type_str for i in range(len(names))]


def _schema(view: View, node: NodeProto) -> Any:
    if node.domain not in _STANDARD or not onnx.defs.has(node.op_type):
        return None
    return onnx.defs.get_schema(node.op_type, opset_of(view.model))


class _Converter:
    """Rewrites a graph node by node.

    names: float value and type -> its name in that type. first: float constant -> the type that keeps its name.
    """

    def __init__(self, view: View, nodes: list[NodeProto]) -> None:
        self.view, self.old = view, nodes
        self.floats = {name for name, (dtype, _) in view.kinds.items() if dtype == FLOAT}
        self.names = {(name, FLOAT): name for name in view.inputs}
        self.first: dict[str, int] = {}
        self.nodes: list[NodeProto] = []
        self.arrays: dict[str, TensorProto] = {}

    def run(self, kinds: list[int]) -> None:
        """Give every node its type, and insert a Cast wherever a value is read in another type than it has."""
        graph = self.view.graph
        others = [item for item in graph.initializer if item.name not in self.floats]
        inside = [name for node in self.old for name in captured(node)]
        for name in (*inside, *self.view.outputs):
            if name in self.view.initializers and name in self.floats:
                self._constant(name, FLOAT)
        for node, kind in zip(self.old, kinds, strict=True):
            self._retype(node, kind)
        arrays, nodes = deepcopy([*others, *self.arrays.values()]), deepcopy(self.nodes)
        del graph.initializer[:], graph.node[:]
        graph.initializer.extend(arrays)
        graph.node.extend(nodes)

    def _retype(self, node: NodeProto, kind: int) -> None:
        schema = _schema(self.view, node)
        types = _types(schema.inputs, node.input) if schema is not None else [""] * len(node.input)
        for position, name in enumerate(node.input):
            if name in self.floats and node.op_type not in _INDIFFERENT:
                node.input[position] = self._as(name, FLOAT if types[position] == _FLOAT_TYPE else kind)
        made = [name for name in node.output if name in self.floats]
        if kind == HALF:
            _retype_attributes(node, bool(made))
        self.nodes.append(node)
        for name in made:
            self.names[name, kind] = name
            if kind == HALF and name in self.view.outputs:
                self.names[name, HALF] = half = unused(self.view, f"{name}.{_TAGS[HALF]}")
                node.output[list(node.output).index(name)] = half
                self._cast(name, FLOAT, name)

    def _as(self, name: str, kind: int) -> str:
        if name in self.view.initializers:
            return self._constant(name, kind)
        if (name, kind) not in self.names:
            self._cast(name, kind, unused(self.view, f"{name}.{_TAGS[kind]}"))
        return self.names[name, kind]

    def _cast(self, name: str, kind: int, made: str) -> None:
        source = self.names[name, HALF if kind == FLOAT else FLOAT]
        self.nodes.append(helper.make_node("Cast", [source], [made], f"{made}.Cast", to=kind))
        self.names[name, kind] = made

    def _constant(self, name: str, kind: int) -> str:
        # What nodes of both types read is stored twice: a Cast of it would cost time at each run.
        same = self.first.setdefault(name, kind) == kind
        new = name if same else unused(self.view, f"{name}.{_TAGS[kind]}")
        if new not in self.arrays:
            array = numpy_helper.to_array(self.view.initializers[name])
            typed = array.astype(np.float16 if kind == HALF else np.float32)
            self.arrays[new] = numpy_helper.from_array(typed, new)
        return new


def _retype_attributes(node: NodeProto, makes_floats: bool) -> None:
    """Set the types in the attributes of a float16 node: of a Cast, of the value that it fills with."""
    for item in node.attribute:
        if node.op_type == "Cast" and item.name == "to" and item.i == FLOAT:
            item.i = HALF
        if item.HasField("t") and item.t.data_type == FLOAT:
            item.t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(item.t).astype(np.float16)))
    if node.op_type == "ConstantOfShape" and makes_floats and attribute(node, "value", None) is None:
        zero = numpy_helper.from_array(np.zeros(1, np.float16))
        node.attribute.append(helper.make_attribute("value", zero))
