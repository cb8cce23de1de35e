"""An ONNX graph at other channel counts with constant weights, on which the time of an operator does not depend.

The weights are stored in the file: made by the runtime when it opens the file, they lie elsewhere in memory (7.4
instead of 9.4 ms for a VGG-16 whose weights do not fit into the cache).
"""

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, TypeProto, helper, numpy_helper

from edgeprune.errors import UnsupportedModel
from edgeprune.models import CostModel, reason
from edgeprune.onnx_graph import ONNX_ERRORS, opset_of

Shape = tuple[int, ...]
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
PER_CHANNEL = ("BatchNormalization", "InstanceNormalization", "GroupNormalization")
CHANNEL = 1
IMAGE_DIMS = 4


@dataclass(frozen=True)
class Resizer:
    """An exported graph that can be resized. shapes: value -> shape. costs: the group of each axis of each weight."""

    model: ModelProto
    shapes: Mapping[str, Shape]
    constants: Mapping[str, TensorProto]
    costs: CostModel

    def shaped(self, kept: Mapping[str, int]) -> dict[str, Shape]:
        """Value -> shape when each group keeps so many channels; groups that are missing keep all."""
        return Resized(self, kept).shapes

    def file(self, kept: Mapping[str, int]) -> ModelProto:
        """The graph at those counts with constant weights and the names of the model."""
        resized = Resized(self, kept)
        model = deepcopy(self.model)
        graph = model.graph
        del graph.node[:], graph.initializer[:], graph.value_info[:]
        graph.node.extend(resized.nodes)
        graph.initializer.extend(resized.constants())
        return _checked(model)

    def layer(self, kept: Mapping[str, int], name: str) -> ModelProto:
        """One node of the graph at those counts alone in a graph, with nothing that may be fused into it."""
        resized = Resized(self, kept)
        node = next(n for n in resized.nodes if n.name == name)
        shape = resized.shapes[node.input[0]]
        # Timing programs feed images: features arrive as an image of one pixel.
        image = shape if len(shape) == IMAGE_DIMS else (1, math.prod(shape), 1, 1)
        given = helper.make_tensor_value_info("input", TensorProto.FLOAT, image)
        output = node.output[0]
        made = helper.make_tensor_value_info(output, TensorProto.FLOAT, resized.shapes[output])
        target = numpy_helper.from_array(np.array(shape, np.int64), "shape")
        first = helper.make_node("Reshape", ["input", "shape"], ["features"], name="features")
        nodes, constants = ([], []) if image == shape else ([first], [target])
        constants += [item for item in resized.constants() if item.name in node.input]
        node.input[0] = "input" if image == shape else "features"
        graph = helper.make_graph([*nodes, node], name, [given], [made], constants)
        model = helper.make_model(graph, opset_imports=list(self.model.opset_import))
        model.ir_version = self.model.ir_version
        return _checked(model)


def _checked(model: ModelProto) -> ModelProto:
    try:
        onnx.checker.check_model(model, full_check=True)
    except ONNX_ERRORS as error:
        raise UnsupportedModel(f"the file at other channel counts is not valid: {reason(error)}") from error
    return model


def resizer(model: ModelProto, costs: CostModel) -> Resizer:
    """For a file that `export` wrote: nodes have the names of their layers, and batch-norms are folded."""
    copy = deepcopy(model)
    for value in (*copy.graph.input, *copy.graph.output):
        batch = value.type.tensor_type.shape.dim[0]
        if not batch.HasField("dim_value"):
            batch.dim_value = 1
    del copy.graph.value_info[:]
    try:
        copy = onnx.shape_inference.infer_shapes(copy, strict_mode=True, data_prop=True)
    except ONNX_ERRORS as error:
        raise UnsupportedModel(f"onnx can't infer the shapes of the file: {reason(error)}") from error
    for node in copy.graph.node:
        if any(a.HasField("g") or len(a.graphs) for a in node.attribute):
            raise UnsupportedModel(
                f"{node.name} ({node.op_type}) has branches, whose time depends on the image"
            )
    constants = {item.name: item for item in copy.graph.initializer}
    for node in copy.graph.node:
        if node.op_type == "Constant" and node.attribute[0].HasField("t"):
            constants[node.output[0]] = node.attribute[0].t
    shapes = {name: tuple(item.dims) for name, item in constants.items()}
    for value in (*copy.graph.input, *copy.graph.output, *copy.graph.value_info):
        shapes[value.name] = tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
    return Resizer(copy, shapes, constants, costs)


class Resized:
    """One walk over the graph: new nodes, constants and shapes."""

    def __init__(self, source: Resizer, kept: Mapping[str, int]) -> None:
        self.source, self.kept = source, kept
        self.opset = opset_of(source.model)
        self.shapes: dict[str, Shape] = {}
        self.kinds: dict[str, TypeProto] = {}
        self.nodes: list[NodeProto] = []
        self.initializers: dict[str, TensorProto] = {}
        self.fills: dict[str, tuple[int, Shape, float]] = {}
        for value in source.model.graph.input:
            if value.name not in source.constants:
                self._know(value.name, value.type)
        for node in source.model.graph.node:
            if not (node.op_type == "Constant" and node.output[0] in source.constants):
                self._add(node)

    def constants(self) -> list[TensorProto]:
        """The inputs of the nodes besides data; all entries of a weight are one number."""
        filled = [
            numpy_helper.from_array(np.full(shape, value, helper.tensor_dtype_to_np_dtype(kind)), name)
            for name, (kind, shape, value) in self.fills.items()
        ]
        return [*self.initializers.values(), *filled]

    def _know(self, name: str, kind: TypeProto) -> None:
        self.kinds[name] = kind
        self.shapes[name] = tuple(d.dim_value for d in kind.tensor_type.shape.dim)

    def _add(self, old: NodeProto) -> None:
        node = deepcopy(old)
        try:
            if node.op_type in WEIGHTED and node.input[1] in self.source.constants:
                self._weighted(node)
            else:
                self._other(node)
            given = {name: self.kinds[name] for name in node.input if name}
            data = {name: self.initializers[name] for name in node.input if name in self.initializers}
            schema = onnx.defs.get_schema(node.op_type, self.opset, node.domain)
            imports = list(self.source.model.opset_import)
            made = onnx.shape_inference.infer_node_outputs(schema, node, given, data, opset_imports=imports)
        except ONNX_ERRORS as error:
            raise UnsupportedModel(
                f"{old.name} ({old.op_type}) can't be given other channel counts: {reason(error)}"
            ) from error
        for name, kind in made.items():
            self._know(name, kind)
        self.nodes.append(node)

    def _weighted(self, node: NodeProto) -> None:
        weight, data = self.source.shapes[node.input[1]], self.shapes[node.input[0]]
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        outputs = self._outputs(node, attributes)
        shape: Shape
        if node.op_type in ("Conv", "ConvTranspose"):
            groups = int(attributes.get("group", 1))
            inputs = data[CHANNEL]
            if groups > 1 and groups == self.source.shapes[node.input[0]][CHANNEL]:
                # Depthwise: one filter bank per input channel.
                outputs, groups = inputs * (_output_channels(weight, node, groups) // groups), inputs
                next(a for a in node.attribute if a.name == "group").i = groups
            ends = (outputs, inputs // groups) if node.op_type == "Conv" else (inputs, outputs // groups)
            shape = (*ends, *weight[2:])
        elif node.op_type == "Gemm":
            shape = (outputs, data[-1]) if attributes.get("transB") else (data[-1], outputs)
        else:
            shape = (*weight[:-2], data[-1], outputs)
        self._fill(node, 1, shape, 1.0 / max(1, math.prod(shape) // max(1, outputs)))
        for position in range(2, len(node.input)):
            if node.input[position]:
                old = self.source.shapes[node.input[position]]
                self._fill(node, position, (*old[:-1], outputs), 0.1)

    def _outputs(self, node: NodeProto, attributes: Mapping[str, Any]) -> int:
        name = f"{node.name.partition('@')[0]}.weight"
        weight = self.source.shapes[node.input[1]]
        before = _output_channels(
            weight, node, int(attributes.get("group", 1)), bool(attributes.get("transB"))
        )
        costs = self.source.costs
        if name not in costs.sizes:
            return before
        axis = 1 if node.op_type == "ConvTranspose" else 0
        gone = sum(
            (costs.channels[g] - self.kept.get(g, costs.channels[g])) * per
            for g, per in costs.shares[name].get(axis, ())
        )
        return before - round(gone)

    def _other(self, node: NodeProto) -> None:
        """Resize constants: scales and shifts as wide as the data, sizes and positions in proportion."""
        source = self.source
        data = [name for name in node.input if name and name not in source.constants]
        before = source.shapes[data[0]] if data else ()
        after = self.shapes[data[0]] if data else ()
        for position, name in enumerate(node.input):
            if name not in source.constants:
                continue
            constant = source.constants[name]
            if constant.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE):
                shape = _fitted(tuple(constant.dims), before, after, node.op_type)
                if shape == tuple(constant.dims):
                    self._keep(node, position, constant)
                else:
                    self._fill(node, position, shape, 0.5)
                continue
            self._keep(node, position, _sizes(node, position, constant, (before, after)))

    def _fill(self, node: NodeProto, position: int, shape: Shape, value: float) -> None:
        kind = self.source.constants[node.input[position]].data_type
        name = f"{node.name}#{position}"
        self.fills[name] = (kind, shape, value)
        node.input[position] = name
        self._know(name, helper.make_tensor_type_proto(kind, shape))

    def _keep(self, node: NodeProto, position: int, constant: TensorProto) -> None:
        name = f"{node.name}#{position}"
        item = deepcopy(constant)
        item.name = name
        self.initializers[name] = item
        node.input[position] = name
        self._know(name, helper.make_tensor_type_proto(item.data_type, tuple(item.dims)))


def _output_channels(weight: Shape, node: NodeProto, groups: int, transposed: bool = False) -> int:
    if node.op_type == "Conv":
        return weight[0]
    if node.op_type == "ConvTranspose":
        return weight[1] * groups
    if node.op_type == "Gemm" and transposed:
        return weight[0]
    return weight[-1]


def _fitted(shape: Shape, before: Shape, after: Shape, op: str) -> Shape:
    if len(before) <= CHANNEL:
        return shape
    if op in PER_CHANNEL and len(shape) == 1:
        return (after[CHANNEL],) if shape[0] == before[CHANNEL] else shape
    # Broadcasting aligns shapes at their last axes.
    offset = len(before) - len(shape)
    return tuple(
        after[i + offset] if i + offset >= 0 and size == before[i + offset] else size
        for i, size in enumerate(shape)
    )


def _sizes(node: NodeProto, position: int, constant: TensorProto, data: tuple[Shape, Shape]) -> TensorProto:
    """A constant shape, sizes of a split or positions along the channels, at other channel counts."""
    before, after = data
    if before == after or position == 0:
        return constant
    values = numpy_helper.to_array(constant)
    if node.op_type == "Reshape":
        return numpy_helper.from_array(np.array(_reshaped(values.tolist(), before, after), np.int64))
    if node.op_type == "Split":
        axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
        return numpy_helper.from_array(values * after[axis] // before[axis])
    bounds_of_slice = node.op_type == "Slice" and position in (1, 2) and len(values) == 1
    if bounds_of_slice and before[CHANNEL] != after[CHANNEL] and abs(int(values[0])) <= before[CHANNEL]:
        scaled = np.round(values * (after[CHANNEL] / before[CHANNEL]))
        return numpy_helper.from_array(scaled.astype(np.int64))
    return constant


def _reshaped(target: Sequence[int], before: Shape, after: Shape) -> list[int]:
    full, new = math.prod(before), math.prod(after)
    known = math.prod(s for s in target if s > 0)
    sizes = [before[i] if s == 0 else s if s > 0 else full // max(1, known) for i, s in enumerate(target)]
    if full != math.prod(sizes) or new == full:
        return list(target)
    able = [i for i, s in enumerate(sizes) if i and s > 1 and s * new % full == 0]
    if not able:
        raise ValueError(f"{list(before)} became {list(after)}, which does not go into {sizes}")
    whole = [i for i in able if sizes[i] == before[CHANNEL]]
    place = whole[0] if whole else min(able, key=lambda i: (sizes[i] in before[2:], i))
    return [s * new // full if i == place else s for i, s in enumerate(sizes)]
