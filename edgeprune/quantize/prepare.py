"""An ONNX model made ready for quantizing: the same logits from fewer kinds of nodes, each of which has a name."""

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
    View,
    attribute,
    copied,
    operand,
    subgraphs,
    unique,
    unused,
    value_names,
)

# A batch-norm after one of these is a scaling of its output channels.
_FOLDABLE = ("Conv", "ConvTranspose", "Gemm")
_IMAGE_RANK = 3


def prepare(model: ModelProto) -> ModelProto:
    """A copy with the same logits, in the form that quantization works on.

    - `Constant` nodes are initializers; `Identity` and (inference only) `Dropout` nodes are removed.
    - `BatchNormalization` after a convolution or a Gemm that nothing else reads is folded into it, and so are the
      factors alpha and beta of a Gemm.
    - a mean over all positions (ReduceMean, AveragePool) is a `GlobalAveragePool`, followed by `Flatten` where the axes
      are dropped; these have int8 kernels, ReduceMean has none. A `Reshape` of every image to a row is a `Flatten` too:
      it has no batch size written into it.
    - every node has a name of its own; the shapes of all values are inferred.
    """
    copy = copied(model)
    lift_constants(copy)
    _drop_passing(copy)
    _name_nodes(copy.graph)
    copy = _with_shapes(copy)
    _fold_factors(copy)
    _fold_batchnorms(copy)
    _use_global_pools(copy)
    view = View(copy)
    kept = [item for item in copy.graph.initializer if view.uses(item.name)]
    del copy.graph.initializer[:]
    copy.graph.initializer.extend(kept)
    return _with_shapes(copy)


def lift_constants(model: ModelProto) -> None:
    """Turn Constant nodes into initializers, in place."""
    view = View(model)
    for node in list(model.graph.node):
        array = view.constant(node.output[0]) if node.op_type == "Constant" else None
        if array is not None:
            model.graph.initializer.append(numpy_helper.from_array(array, node.output[0]))
            model.graph.node.remove(node)


def _with_shapes(model: ModelProto) -> ModelProto:
    del model.graph.value_info[:]
    try:
        return onnx.shape_inference.infer_shapes(model)
    except ONNX_ERRORS as error:
        raise UnsupportedModel(f"onnx can't infer the shapes of the model: {reason(error)}") from error


def _drop_passing(model: ModelProto) -> None:
    graph, view = model.graph, View(model)
    producers = dict(view.producers)
    for node in list(graph.node):
        if not _passes(view, node):
            continue
        source, made = node.input[0], node.output[0]
        if made not in view.outputs:
            graph.node.remove(node)
            _rename_reads(graph, made, source)
            continue
        producer = producers.get(source)
        if producer is not None and source not in view.outputs:
            producer.output[list(producer.output).index(source)] = made
            producers[made] = producer
            graph.node.remove(node)
            _rename_reads(graph, source, made)


def _passes(view: View, node: NodeProto) -> bool:
    if node.op_type != "Dropout":
        return node.op_type == "Identity"
    mode = view.constant(operand(node, 2))
    training = bool(operand(node, 2)) and (mode is None or bool(mode.any()))
    return not training and not any(view.uses(name) for name in node.output[1:])


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


def _name_nodes(graph: GraphProto) -> None:
    count = Counter(node.name for node in graph.node)
    taken = {name for name, times in count.items() if name and times == 1}
    for node in graph.node:
        if not node.name or count[node.name] > 1:
            made = next((name for name in node.output if name), node.op_type)
            node.name = unique(node.name or made, taken)


def _fold_factors(model: ModelProto) -> None:
    view = View(model)
    for node in model.graph.node:
        for factor, position in (("alpha", 1), ("beta", 2)):
            name = operand(node, position)
            if node.op_type != "Gemm" or name not in view.initializers or view.uses(name) > 1:
                continue
            for item in node.attribute:
                if item.name == factor and item.f != 1.0:
                    _store(view, name, _stored(view, name) * np.float32(item.f))
                    item.f = 1.0


def _fold_batchnorms(model: ModelProto) -> None:
    for norm in [node for node in model.graph.node if node.op_type == "BatchNormalization"]:
        view = View(model)
        layer = view.producers.get(norm.input[0])
        if layer is None or layer.op_type not in _FOLDABLE or len(norm.output) > 1:
            continue
        # Other readers of the layer's output or of its weight must still get what they get now.
        alone = all(view.uses(name) == 1 for name in (norm.input[0], *layer.input[1:]))
        if alone and all(name in view.initializers for name in (*norm.input[1:5], *layer.input[1:])):
            _fold_batchnorm(view, layer, norm)


def _fold_batchnorm(view: View, layer: NodeProto, norm: NodeProto) -> None:
    scale, shift, mean, variance = (_stored(view, name) for name in norm.input[1:5])
    factor = scale / np.sqrt(variance + float(attribute(norm, "epsilon", 1e-5)))
    weight = _stored(view, layer.input[1])
    if layer.op_type == "ConvTranspose":
        groups, shape = int(attribute(layer, "group", 1)), weight.shape
        parts = weight.reshape(groups, shape[0] // groups, *shape[1:])
        weight = (parts * factor.reshape(groups, 1, shape[1], *[1] * (len(shape) - 2))).reshape(shape)
    else:
        axis = 1 if layer.op_type == "Gemm" and not attribute(layer, "transB", 0) else 0
        weight = weight * np.expand_dims(factor, [i for i in range(weight.ndim) if i != axis])
    bias = _stored(view, layer.input[2]) if len(layer.input) > 2 else np.zeros_like(mean)
    _store(view, layer.input[1], weight)
    folded = (bias - mean) * factor + shift
    if len(layer.input) > 2:
        _store(view, layer.input[2], folded)
    else:
        layer.input.append(unused(view, f"{layer.name}.bias"))
        view.graph.initializer.append(numpy_helper.from_array(folded.astype(np.float32), layer.input[2]))
    layer.output[0] = norm.output[0]
    view.graph.node.remove(norm)


def _stored(view: View, name: str) -> Array:
    return numpy_helper.to_array(view.initializers[name]).astype(np.float64)


def _store(view: View, name: str, value: Array) -> None:
    array = np.ascontiguousarray(value.astype(np.float32))
    view.initializers[name].CopyFrom(numpy_helper.from_array(array, name))


def _use_global_pools(model: ModelProto) -> None:
    graph, view = model.graph, View(model)
    taken, names = value_names(graph), {node.name for node in graph.node}
    for node in list(graph.node):
        keeps_axes = _is_global_mean(view, node)
        if keeps_axes is not None:
            source, made = node.input[0], node.output[0]
            pooled = made if keeps_axes else unique(f"{made}.pool", taken)
            nodes = [helper.make_node("GlobalAveragePool", [source], [pooled], node.name)]
            if not keeps_axes:
                name = unique(f"{node.name}.Flatten", names)
                nodes.append(helper.make_node("Flatten", [pooled], [made], name, axis=1))
        elif _flattens(view, node):
            nodes = [helper.make_node("Flatten", node.input[:1], node.output, node.name, axis=1)]
        else:
            continue
        position = list(graph.node).index(node)
        graph.node.remove(node)
        for offset, new in enumerate(nodes):
            graph.node.insert(position + offset, new)


def _is_global_mean(view: View, node: NodeProto) -> bool | None:
    """Whether the axes stay where a node is a mean over all positions; None where it is none."""
    shape = view.shape(operand(node, 0))
    if len(shape) < _IMAGE_RANK:
        return None
    if node.op_type == "ReduceMean":
        axes = view.constant(node.input[1]) if operand(node, 1) else attribute(node, "axes", None)
        found = sorted(int(a) % len(shape) for a in np.ravel(axes)) if axes is not None else []
        return bool(attribute(node, "keepdims", 1)) if found == list(range(2, len(shape))) else None
    if node.op_type != "AveragePool":
        return None
    auto_pad, pads = attribute(node, "auto_pad", b"NOTSET"), attribute(node, "pads", ())
    plain = auto_pad in (b"NOTSET", b"VALID") and not any(pads)
    dense = all(d == 1 for d in attribute(node, "dilations", ()))
    return True if tuple(attribute(node, "kernel_shape", ())) == shape[2:] and plain and dense else None


def _flattens(view: View, node: NodeProto) -> bool:
    before, after = view.shape(operand(node, 0)), view.shape(node.output[0])
    if node.op_type != "Reshape" or len(before) < 2 or len(after) != 2:
        return False
    return after[0] == before[0] and after[1] == math.prod(size or 0 for size in before[1:]) > 0
