"""A float32 ONNX graph in float16, with float32 at its ends and wherever float16 would lose what counts.

Every value has one type and every change of type is a Cast in the file, so that a runtime that takes types as they are
written (TensorRT 11 knows no other way) runs just that. A node is float16 or float32 as a whole; what stays float32
is decided by the activations and weights themselves, not by a list of layers.
"""

from __future__ import annotations

from collections.abc import Collection
from copy import deepcopy
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from edgeprune.errors import UnsupportedModel
from edgeprune.nn.capture import reason
from edgeprune.nn.onnx_file import ONNX_ERRORS
from edgeprune.nn.onnx_half_reasons import FLOAT, HALF, Reasons, needs
from edgeprune.nn.onnx_view import View, attribute, captured, copied, title, unused

if TYPE_CHECKING:
    from edgeprune.nn.activations import Activations

_TAGS = {FLOAT: "fp32", HALF: "fp16"}


def half(
    model: ModelProto, seen: Activations, *, skip: Collection[str] = ()
) -> tuple[ModelProto, dict[str, str]]:
    """Convert a graph to float16; its inputs and outputs stay float32.

    A node stays float32 when it is in `skip`; when ONNX has it for float32 only, or it holds a graph; when it squares,
    exponentiates or normalizes; when one of its values went above half of what float16 can hold, or never rose above
    where float16 loses digits; when it sums so many entries that the sum may not fit; or when rounding its weight
    changes that by more than 0.1 %.

    Args:
        model: float32; not changed. Conv, Gemm and so on with their weights as initializers.
        seen: the activations of `model`; those that are missing are taken to be within range.
        skip: names of nodes to keep in float32.

    Returns:
        The float16 graph, and {node that stays float32: why}, in the order of the graph.

    Raises:
        UnsupportedModel: the graph has types that can't be told apart, or the result is no valid ONNX.
    """
    copy = copied(model)
    _hoist(copy)
    view = View(copy)
    reasons = Reasons(view, seen, skip)
    nodes = list(copy.graph.node)
    why = [reasons.of(node) for node in nodes]
    kept = {title(node): said for node, said in zip(nodes, why, strict=True) if said}
    _Converter(view, nodes).run([FLOAT if said else HALF for said in why])
    del copy.graph.value_info[:]
    try:
        inferred = onnx.shape_inference.infer_shapes(copy, check_type=True, strict_mode=True)
        onnx.checker.check_model(inferred, full_check=True)
    except ONNX_ERRORS as error:
        raise UnsupportedModel(f"the float16 graph is no valid ONNX: {reason(error)}") from error
    return inferred, kept


def _hoist(model: ModelProto) -> None:
    """Make initializers of Constant nodes."""
    view = View(model)
    for node in [node for node in model.graph.node if node.op_type == "Constant"]:
        array = view.constant(node.output[0])
        if array is not None and array.dtype.kind in "fiub":
            model.graph.initializer.append(numpy_helper.from_array(array, node.output[0]))
            model.graph.node.remove(node)


class _Converter:
    """Rewrites a graph node by node.

    have: float value -> its type as the graph is now. first: float constant -> the type that keeps its name.
    """

    def __init__(self, view: View, nodes: list[NodeProto]) -> None:
        self.view, self.old = view, nodes
        self.floats = {name for name, (dtype, _) in view.kinds.items() if dtype == FLOAT}
        self.have = dict.fromkeys(view.inputs, FLOAT)
        self.first: dict[str, int] = {}
        self.casts: dict[tuple[str, int], str] = {}
        self.nodes: list[NodeProto] = []
        self.arrays: dict[str, TensorProto] = {}

    def run(self, kinds: list[int]) -> None:
        """Give every node its kind, and put a Cast wherever a value is needed in another type than it has."""
        graph = self.view.graph
        plain = [item for item in graph.initializer if item.name not in self.floats]
        inside = [name for node in self.old for name in captured(node)]
        for name in (*inside, *self.view.outputs):
            if name in self.view.initializers and name in self.floats:
                self._constant(name, FLOAT)
        for node, kind in zip(self.old, kinds, strict=True):
            self._retype(node, kind)
        for name in dict.fromkeys(self.view.outputs):
            if self.have.get(name) == HALF:
                self._cast_output(name)
        arrays = deepcopy([*plain, *self.arrays.values()])
        made = deepcopy(self.nodes)
        del graph.initializer[:], graph.node[:]
        graph.initializer.extend(arrays)
        graph.node.extend(made)

    def _retype(self, node: NodeProto, kind: int) -> None:
        wanted = needs(self.view, node, kind)
        for position, name in enumerate(node.input):
            if name in self.floats and wanted[position]:
                node.input[position] = self._as(name, wanted[position])
        for name in node.output:
            if name in self.floats:
                self.have[name] = kind
        if kind == HALF:
            _retype_attributes(node, bool(self.floats & set(node.output)))
        self.nodes.append(node)

    def _as(self, name: str, kind: int) -> str:
        """The name under which a value is to be had in a type."""
        if name in self.view.initializers:
            return self._constant(name, kind)
        if self.have[name] == kind:
            return name
        if (name, kind) not in self.casts:
            made = unused(self.view, f"{name}.{_TAGS[kind]}")
            self.nodes.append(helper.make_node("Cast", [name], [made], f"{made}.Cast", to=kind))
            self.casts[name, kind] = made
        return self.casts[name, kind]

    def _constant(self, name: str, kind: int) -> str:
        # What nodes of both types read is stored twice: a Cast of it would cost time at each run.
        same = self.first.setdefault(name, kind) == kind
        new = name if same else unused(self.view, f"{name}.{_TAGS[kind]}")
        if new not in self.arrays:
            array = numpy_helper.to_array(self.view.initializers[name])
            typed = array.astype(np.float16 if kind == HALF else np.float32)
            self.arrays[new] = numpy_helper.from_array(typed, new)
        return new

    def _cast_output(self, name: str) -> None:
        made = unused(self.view, f"{name}.{_TAGS[HALF]}")
        for node in self.nodes:
            for values in (node.input, node.output):
                values[:] = [made if value == name else value for value in values]
        self.nodes.append(helper.make_node("Cast", [made], [name], f"{name}.Cast", to=FLOAT))


def _retype_attributes(node: NodeProto, makes_floats: bool) -> None:
    """What a float16 node says about types: the aim of a Cast, the value that it fills with."""
    for item in node.attribute:
        if node.op_type == "Cast" and item.name == "to" and item.i == FLOAT:
            item.i = HALF
        if item.HasField("t") and item.t.data_type == FLOAT:
            item.t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(item.t).astype(np.float16)))
    if node.op_type == "ConstantOfShape" and makes_floats and attribute(node, "value", None) is None:
        node.attribute.append(
            helper.make_attribute("value", numpy_helper.from_array(np.zeros(1, np.float16)))
        )
