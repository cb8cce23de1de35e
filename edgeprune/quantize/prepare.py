"""An ONNX model made ready for quantizing: the same answers from fewer kinds of nodes, each of which has a name."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper

from edgeprune.errors import UnsupportedModel
from edgeprune.models import reason
from edgeprune.onnx_graph import (
    ONNX_ERRORS,
    Array,
    attributes,
    consumers,
    initializers,
    subgraphs,
    unique,
    value_names,
)

# A batch-norm after one of these is a scaling of its output channels.
_FOLDABLE = ("Conv", "ConvTranspose", "Gemm")
_IMAGE_RANK = 3


def prepare(model: ModelProto) -> ModelProto:
    """A copy that answers alike, in the form that quantization works on.

    - `Constant` nodes are initializers; `Identity` and, as they do nothing here, `Dropout` nodes are gone.
    - `BatchNormalization` after a convolution or a Gemm that nothing else reads is folded into it, and so are the
      factors alpha and beta of a Gemm.
    - a mean over all positions (ReduceMean, AveragePool) is a `GlobalAveragePool`, with `Flatten` behind it where the
      axes went; these have int8 kernels, ReduceMean has none. A `Reshape` of every image to a row is a `Flatten` too:
      it has no batch size written into it.
    - every node has a name of its own; the shapes of all values are inferred.
    """
    copy = ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    _lift_constants(graph)
    _drop_passing(graph)
    _name_nodes(graph)
    copy = _with_shapes(copy)
    graph = copy.graph
    _fold_factors(graph)
    _fold_batchnorms(graph)
    _use_global_pools(graph, _shapes(graph))
    _drop_unused(graph)
    return _with_shapes(copy)


def _with_shapes(model: ModelProto) -> ModelProto:
    del model.graph.value_info[:]
    try:
        return onnx.shape_inference.infer_shapes(model)
    except ONNX_ERRORS as error:
        raise UnsupportedModel(f"onnx can't infer the shapes of the model: {reason(error)}") from error


def _shapes(graph: GraphProto) -> dict[str, tuple[int, ...]]:
    """Value name -> its shape, 0 for an open dimension; without those of unknown rank."""
    found: dict[str, tuple[int, ...]] = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        if value.type.tensor_type.HasField("shape"):
            found[value.name] = tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
    return found


def _rename_reads(graph: GraphProto, old: str, new: str) -> None:
    for node in graph.node:
        for position, name in enumerate(node.input):
            if name == old:
                node.input[position] = new
        for body in subgraphs(node):
            _rename_reads(body, old, new)
            for value in body.output:
                if value.name == old:
                    value.name = new


def _lift_constants(graph: GraphProto) -> None:
    for node in list(graph.node):
        values = attributes(node)
        if node.op_type != "Constant":
            continue
        if "value" in values:
            tensor = onnx.TensorProto()
            tensor.CopyFrom(values["value"])
        elif "value_float" in values or "value_floats" in values:
            found = values.get("value_float", values.get("value_floats"))
            tensor = numpy_helper.from_array(np.asarray(found, np.float32))
        elif "value_int" in values or "value_ints" in values:
            tensor = numpy_helper.from_array(
                np.asarray(values.get("value_int", values.get("value_ints")), np.int64)
            )
        else:
            continue
        tensor.name = node.output[0]
        graph.initializer.append(tensor)
        graph.node.remove(node)


def _drop_passing(graph: GraphProto) -> None:
    outputs = {value.name for value in graph.output}
    producers = {name: node for node in graph.node for name in node.output}
    for node in list(graph.node):
        if not _passes(node, graph):
            continue
        source, made = node.input[0], node.output[0]
        if made in outputs:
            producer = producers.get(source)
            if producer is None or source in outputs:
                continue
            position = list(producer.output).index(source)
            producer.output[position] = made
            producers[made] = producer
            graph.node.remove(node)
            _rename_reads(graph, source, made)
            continue
        graph.node.remove(node)
        _rename_reads(graph, made, source)


def _passes(node: NodeProto, graph: GraphProto) -> bool:
    if node.op_type == "Identity":
        return True
    if node.op_type != "Dropout":
        return False
    mode = node.input[2] if len(node.input) > 2 else ""
    training = mode and bool(np.any(initializers(graph).get(mode, np.array(True))))
    return not training and not any(name in consumers(graph) for name in node.output[1:])


def _name_nodes(graph: GraphProto) -> None:
    count = Counter(node.name for node in graph.node)
    taken = {name for name, times in count.items() if name and times == 1}
    for node in graph.node:
        if not node.name or count[node.name] > 1:
            made = next((name for name in node.output if name), node.op_type)
            node.name = unique(node.name or made, taken)


def _fold_factors(graph: GraphProto) -> None:
    constants, read = initializers(graph), consumers(graph)
    for node in graph.node:
        given = attributes(node)
        for factor, position in (("alpha", 1), ("beta", 2)):
            value = float(given.get(factor, 1.0))
            name = node.input[position] if len(node.input) > position else ""
            if node.op_type != "Gemm" or value == 1.0 or name not in constants or len(read[name]) > 1:
                continue
            _set_initializer(graph, name, constants[name] * np.float32(value))
            _set_attribute(node, factor, 1.0)


def _fold_batchnorms(graph: GraphProto) -> None:
    producers = {name: node for node in graph.node for name in node.output}
    for norm in list(graph.node):
        before = producers.get(norm.input[0]) if norm.op_type == "BatchNormalization" else None
        if before is None or before.op_type not in _FOLDABLE:
            continue
        read = consumers(graph)
        known = initializers(graph)
        inputs = [*norm.input[1:5], *before.input[1:]]
        # Whoever else reads the sum before it, or applies the same weight, must go on getting what it gets.
        alone = len(read[norm.input[0]]) == 1 and all(len(read[name]) == 1 for name in before.input[1:])
        exposed = norm.input[0] in {value.name for value in graph.output}
        if alone and not exposed and all(name in known for name in inputs) and len(norm.output) == 1:
            _fold_batchnorm(graph, before, norm, known)
            producers[norm.output[0]] = before


def _fold_batchnorm(graph: GraphProto, layer: NodeProto, norm: NodeProto, known: dict[str, Array]) -> None:
    scale, shift, mean, variance = (known[name].astype(np.float64) for name in norm.input[1:5])
    factor = scale / np.sqrt(variance + float(attributes(norm).get("epsilon", 1e-5)))
    weight = known[layer.input[1]].astype(np.float64)
    given = attributes(layer)
    if layer.op_type == "ConvTranspose":
        groups = int(given.get("group", 1))
        shape = weight.shape
        parts = weight.reshape(groups, shape[0] // groups, *shape[1:])
        weight = (parts * factor.reshape(groups, 1, shape[1], *[1] * (len(shape) - 2))).reshape(shape)
    else:
        axis = 1 if layer.op_type == "Gemm" and not given.get("transB", 0) else 0
        weight = weight * np.expand_dims(factor, [i for i in range(weight.ndim) if i != axis])
    bias = known[layer.input[2]].astype(np.float64) if len(layer.input) > 2 else np.zeros_like(mean)
    _set_initializer(graph, layer.input[1], weight.astype(np.float32))
    folded = ((bias - mean) * factor + shift).astype(np.float32)
    if len(layer.input) > 2:
        _set_initializer(graph, layer.input[2], folded)
    else:
        name = unique(f"{layer.name}.bias", value_names(graph))
        layer.input.append(name)
        graph.initializer.append(numpy_helper.from_array(folded, name))
    layer.output[0] = norm.output[0]
    graph.node.remove(norm)


def _use_global_pools(graph: GraphProto, shapes: dict[str, tuple[int, ...]]) -> None:
    constants, taken = initializers(graph), value_names(graph)
    names = {node.name for node in graph.node}
    for node in list(graph.node):
        kept = _is_global_mean(node, shapes, constants)
        if kept is not None:
            source, made = node.input[0], node.output[0]
            pooled = made if kept else unique(f"{made}.pool", taken)
            pool = helper.make_node("GlobalAveragePool", [source], [pooled], node.name)
            flat = helper.make_node(
                "Flatten", [pooled], [made], unique(f"{node.name}.Flatten", names), axis=1
            )
            _replace(graph, node, [pool] if kept else [pool, flat])
        elif _flattens(node, shapes):
            # A Reshape has the batch size written into it.
            _replace(
                graph, node, [helper.make_node("Flatten", node.input[:1], node.output, node.name, axis=1)]
            )


def _is_global_mean(
    node: NodeProto, shapes: dict[str, tuple[int, ...]], constants: dict[str, Array]
) -> bool | None:
    """Whether the axes stay where a node is a mean over all positions; None where it is none."""
    shape, given = shapes.get(node.input[0] if node.input else "", ()), attributes(node)
    if len(shape) < _IMAGE_RANK:
        return None
    if node.op_type == "ReduceMean":
        stated = constants.get(node.input[1]) if len(node.input) > 1 else given.get("axes")
        axes = sorted(int(a) % len(shape) for a in np.ravel(stated)) if stated is not None else []
        return bool(given.get("keepdims", 1)) if axes == list(range(2, len(shape))) else None
    if node.op_type != "AveragePool" or 0 in shape[2:]:
        return None
    padded = any(given.get("pads", ())) or given.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID")
    spread = any(d != 1 for d in given.get("dilations", ()))
    return True if tuple(given["kernel_shape"]) == shape[2:] and not padded and not spread else None


def _flattens(node: NodeProto, shapes: dict[str, tuple[int, ...]]) -> bool:
    before, after = shapes.get(node.input[0] if node.input else "", ()), shapes.get(node.output[0], ())
    if node.op_type != "Reshape" or len(before) < 2 or len(after) != 2:
        return False
    return after[0] == before[0] and after[1] == math.prod(before[1:]) > 0


def _drop_unused(graph: GraphProto) -> None:
    used = set(consumers(graph)) | {value.name for value in graph.output}
    kept = [item for item in graph.initializer if item.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _replace(graph: GraphProto, old: NodeProto, new: list[NodeProto]) -> None:
    position = list(graph.node).index(old)
    graph.node.remove(old)
    for offset, node in enumerate(new):
        graph.node.insert(position + offset, node)


def _set_initializer(graph: GraphProto, name: str, value: Array) -> None:
    item = next(item for item in graph.initializer if item.name == name)
    item.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value), name))


def _set_attribute(node: NodeProto, name: str, value: float) -> None:
    kept = [item for item in node.attribute if item.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])
