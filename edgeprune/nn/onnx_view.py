"""An ONNX graph as maps: who makes a value, who reads it, which are constant, what shape and type each has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from edgeprune.errors import UnsupportedModel
from edgeprune.nn.capture import reason
from edgeprune.nn.onnx_file import ONNX_ERRORS

Array = npt.NDArray[Any]
Shape = tuple[int | None, ...]
# How a Constant node may hold its value, and of what type it is then; "value" says that itself.
_CONSTANTS: Mapping[str, Any] = {
    "value": None, "value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64,
}  # fmt: skip


class View:
    """The main graph of a model as it is now; make another one after changing the graph."""

    def __init__(self, model: ModelProto) -> None:
        """Look at `model`, which is kept and not changed."""
        self.model, self.graph = model, model.graph
        self.inputs = tuple(value.name for value in self.graph.input)
        self.outputs = tuple(value.name for value in self.graph.output)
        self.initializers: Mapping[str, TensorProto] = {item.name: item for item in self.graph.initializer}
        self.producers: Mapping[str, NodeProto] = {
            name: node for node in self.graph.node for name in node.output if name
        }

    @cached_property
    def readers(self) -> Mapping[str, list[NodeProto]]:
        """Value -> nodes of the main graph that read it, once for each time they do, in branches included."""
        found: dict[str, list[NodeProto]] = {}
        for node in self.graph.node:
            for name in (*node.input, *captured(node)):
                found.setdefault(name, []).append(node)
        return found

    @cached_property
    def kinds(self) -> Mapping[str, tuple[int, Shape]]:
        """Value -> its element type and its shape, None for what is free or unknown.

        Raises:
            UnsupportedModel: onnx can't infer the shapes.
        """
        try:
            inferred = onnx.shape_inference.infer_shapes(self.model, data_prop=True).graph
        except ONNX_ERRORS as error:
            raise UnsupportedModel(f"onnx can't infer the shapes of the model: {reason(error)}") from error
        found: dict[str, tuple[int, Shape]] = {
            name: (item.data_type, tuple(item.dims)) for name, item in self.initializers.items()
        }
        for value in (*inferred.input, *inferred.output, *inferred.value_info):
            kind = value.type.tensor_type
            shape = tuple(d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim)
            found[value.name] = (kind.elem_type, shape)
        return found

    def shape(self, name: str) -> Shape:
        """The shape of a value, None for a free dimension; () when nothing is known."""
        return self.kinds.get(name, (0, ()))[1]

    def dtype(self, name: str) -> int:
        """The element type of a value, as in TensorProto; 0 when it is not known."""
        return self.kinds.get(name, (0, ()))[0]

    def uses(self, name: str) -> int:
        """How often a value is read, as an output of the model included."""
        return len(self.readers.get(name, ())) + self.outputs.count(name)

    def constant(self, name: str) -> Array | None:
        """What an initializer or a Constant node holds; None for any other value."""
        if name in self.initializers:
            return numpy_helper.to_array(self.initializers[name])
        node = self.producers.get(name)
        if node is None or node.op_type != "Constant":
            return None
        item = next((item for item in node.attribute if item.name.startswith("value")), None)
        if item is None or item.name not in _CONSTANTS:
            return None
        value = helper.get_attribute_value(item)
        return (
            numpy_helper.to_array(value) if item.name == "value" else np.asarray(value, _CONSTANTS[item.name])
        )


def attribute(node: NodeProto, name: str, default: Any) -> Any:
    """The value of a node's attribute, or `default` where it has none."""
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def operand(node: NodeProto, position: int) -> str:
    """The name of a node's input, "" where that is left out."""
    return node.input[position] if len(node.input) > position else ""


def captured(node: NodeProto) -> Iterator[str]:
    """The values that the graphs inside of a node read and do not make themselves."""
    for item in node.attribute:
        for body in (*([item.g] if item.HasField("g") else []), *item.graphs):
            yield from _free(body)


def title(node: NodeProto) -> str:
    """What a node is called: its name, or where it has none what it makes."""
    return node.name or node.output[0]


def copied(model: ModelProto) -> ModelProto:
    """A copy that can be changed."""
    copy = ModelProto()
    copy.CopyFrom(model)
    return copy


def unused(view: View, wish: str) -> str:
    """A name that no value of the graph has: `wish`, or that with a number."""
    taken = {*view.initializers, *view.producers, *view.inputs, *view.outputs}
    return next(
        name for name in (wish, *(f"{wish}@{i}" for i in range(2, len(taken) + 3))) if name not in taken
    )


def _free(graph: GraphProto) -> Iterator[str]:
    own = {value.name for value in (*graph.input, *graph.initializer)}
    own |= {name for node in graph.node for name in node.output}
    for node in graph.node:
        yield from (name for name in (*node.input, *captured(node)) if name and name not in own)
    yield from (value.name for value in graph.output if value.name not in own)


def inputs_of(model: ModelProto) -> list[onnx.ValueInfoProto]:
    """The inputs of a model; older files list their initializers among them."""
    constants = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in constants]


def add_node(model: ModelProto, op: str, inputs: Sequence[str], **attributes: Any) -> str:
    """A node more at the end of the graph; the name of its one output."""
    name = unused(View(model), f"edgeprune.{op}")
    model.graph.node.append(helper.make_node(op, list(inputs), [name], name, **attributes))
    return name


def add_constant(model: ModelProto, value: Any) -> str:
    """An initializer more; its name."""
    name = unused(View(model), "edgeprune.number")
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return name


def one_hot(model: ModelProto, name: str, classes: int, *, ranked: bool) -> str:
    """Rows (N, classes) of class numbers (N,), or of the first of each row if `ranked`: 1 at the class, 0 elsewhere.

    A number that is none of the classes gives NaN, which is never right.
    """
    if ranked:
        name = add_node(model, "Flatten", [name], axis=1)
        name = add_node(model, "Gather", [name, add_constant(model, np.int64(0))], axis=1)
    name = add_node(model, "Reshape", [name, add_constant(model, np.array([-1, 1], np.int64))])
    name = add_node(model, "Cast", [name], to=TensorProto.INT64)
    name = add_node(model, "Equal", [name, add_constant(model, np.arange(classes, dtype=np.int64)[None])])
    name = add_node(model, "Cast", [name], to=TensorProto.FLOAT)
    total = add_node(model, "MatMul", [name, add_constant(model, np.ones((classes, 1), np.float32))])
    return add_node(model, "Div", [name, total])
