"""An ONNX model made fit to ship: named after the layers, private, simplified, described, checked."""

import ast
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import onnx
import onnxslim
from google.protobuf.message import Message
from onnx import GraphProto, ModelProto, NodeProto

from edgeprune.errors import UnsupportedModel
from edgeprune.models import quiet, reason
from edgeprune.onnx_graph.index import ONNX_ERRORS, all_nodes, defined_names, subgraphs, unique
from edgeprune.version import __version__

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# What may stand between a parameter and the node that applies it.
PASSING = ("Transpose", "Reshape", "Identity", "Cast")
# The file version that brought functions.
FUNCTIONS_IR = 8
# What torch's exporter notes at a node: the modules that ran it, and the operation with its arguments.
SCOPES, OPERATION = "pkg.torch.onnx.name_scopes", "pkg.torch.onnx.fx_node"
# onnxslim raises whatever its Python meets, assertions included.


def name_after_layers(model: ModelProto, modules: Mapping[str, bool], prefix: str) -> None:
    """Rename nodes, values and initializers after the network's modules, in place.

    Conv, ConvTranspose, Gemm and MatMul nodes get the path of the layer whose weight they apply, such as
    "layer1.0.conv1"; other nodes that of the module that ran them and what they do, such as "layer1.0.Add".
    The second node of a name gets "@2" and so on. A node's output is called like the node, a layer's
    initializers "layer1.0.conv1.weight" and ".bias". Names of the model's inputs and outputs stay.
    """
    names = _Names(model.graph)
    layers = {f"p_{path}_weight".replace(".", "_"): path for path, is_layer in modules.items() if is_layer}
    for node in model.graph.node:
        scope = _scope(node, modules)
        layer = _argument(node, layers) or _layer(node, scope, modules, names)
        node.name = unique(_without(prefix, layer or f"{scope}.{node.op_type}".strip(".")), names.nodes)
    _name_values(model.graph, prefix)


def strip(model: ModelProto) -> None:
    """Remove what an exporter tells of the machine it ran on, in place.

    That is the metadata and the documentation of the model and of every part of it, and the imports of
    operator sets that no node needs.
    """
    _clean(model)
    nodes = [*all_nodes(model.graph), *(node for function in model.functions for node in function.node)]
    used = {_domain(node.domain) for node in nodes} | {""}
    imports = [item for item in model.opset_import if _domain(item.domain) in used]
    del model.opset_import[:]
    model.opset_import.extend(imports)


def slim(model: ModelProto) -> ModelProto:
    """The graph simplified by onnxslim, its layers' names kept; `model` stays as it is."""
    copy = ModelProto()
    copy.CopyFrom(model)
    try:
        with quiet():
            # FusionGemm turns a MatMul on a sequence into Reshape, Gemm, Reshape: more nodes, no gain.
            options: Any = {"skip_fusion_patterns": ["FusionGemm"]}
            slimmed = onnxslim.slim(copy, **options)
    except ONNX_ERRORS as error:
        raise UnsupportedModel(f"onnxslim failed: {reason(error)}") from error
    if not isinstance(slimmed, ModelProto):
        raise UnsupportedModel("onnxslim gave no model")
    _keep_names(model.graph, slimmed.graph)
    return slimmed


def finish(model: ModelProto, about: Mapping[str, str]) -> None:
    """Last touches, in place: privacy, metadata, the oldest file version that fits, shapes, onnx's own check."""
    strip(model)
    model.producer_name, model.producer_version = "edgeprune", __version__
    for key in sorted(about):
        model.metadata_props.add(key=key, value=about[key])
    # Runtimes on devices are older than onnx here, and refuse a file version that they don't know.
    oldest = onnx.helper.find_min_ir_version_for(list(model.opset_import), ignore_unknown=True)
    model.ir_version = max(oldest, FUNCTIONS_IR) if model.functions else oldest
    del model.graph.value_info[:]
    try:
        model.CopyFrom(onnx.shape_inference.infer_shapes(model))
        onnx.checker.check_model(model, full_check=True)
    except ONNX_ERRORS as error:
        raise UnsupportedModel(f"the exported model fails onnx's check: {reason(error)}") from error


class _Names:
    """The names of a graph, old and new. nodes: new node names; new: old value name -> new one."""

    def __init__(self, graph: GraphProto) -> None:
        self.initializers = {item.name for item in graph.initializer}
        self.uses = Counter(name for node in all_nodes(graph) for name in node.input)
        self.producers = {name: node for node in graph.node for name in node.output}
        self.fixed = {value.name for value in (*graph.input, *graph.output)} | {""}
        # A new name must not be that of a value inside the branches of an If or the body of a Loop.
        inner = {name for node in graph.node for part in subgraphs(node) for name in defined_names(part)}
        self.values = self.fixed | inner
        self.nodes: set[str] = set()
        self.new: dict[str, str] = {}

    def rename(self, old: str, wish: str) -> None:
        """Give a value its new name, once; inputs and outputs of the model keep theirs."""
        if old not in self.new:
            self.new[old] = old if old in self.fixed else unique(wish, self.values)

    def is_weight(self, value: str) -> bool:
        """Whether a value is an initializer, perhaps transposed or reshaped on its way."""
        return self._origins(value)[-1] in self.initializers

    def owners(self, value: str) -> list[str]:
        """The paths of the modules that a value, or what it was made from, may be a parameter of."""
        return [name.rpartition(".")[0] for name in self._origins(value)]

    def maker(self, value: str) -> str:
        """The weighted node that a value comes from through nodes with constants only, or ""."""
        while node := self.producers.get(value):
            if node.op_type in WEIGHTED:
                return node.name
            data = [name for name in node.input if name and not self._is_constant(name)]
            if len(data) != 1:
                break
            value = data[0]
        return ""

    def _is_constant(self, value: str) -> bool:
        node = self.producers.get(value)
        return self.is_weight(value) or (node is not None and node.op_type == "Constant")

    def _origins(self, value: str) -> list[str]:
        chain = [value]
        while (node := self.producers.get(chain[-1])) and node.op_type in PASSING:
            chain.append(node.input[0])
        return chain


def _name_values(graph: GraphProto, prefix: str = "") -> None:
    names = _Names(graph)
    for node in graph.node:
        for role, value in zip(("weight", "bias"), node.input[1:3], strict=False):
            if node.op_type in WEIGHTED and value in names.initializers and names.uses[value] == 1:
                names.rename(value, f"{node.name}.{role}")
    for node in graph.node:
        for position, value in enumerate(node.output):
            names.rename(value, f"{node.name}:{position}" if position else node.name)
    for item in graph.initializer:
        names.rename(item.name, _without(prefix, item.name.replace("/", ".").strip(".")))
        item.name = names.new[item.name]
    del graph.value_info[:]
    _apply(graph, names.new)


def _keep_names(before: GraphProto, after: GraphProto) -> None:
    """Name what onnxslim merged: it calls a convolution that took up a batch-norm after an output on the way."""
    names = _Names(before)
    known = {node.name for node in before.node if node.op_type in WEIGHTED}
    taken = {node.name for node in after.node}
    for node in after.node:
        if node.op_type in WEIGHTED and node.name not in known:
            maker = names.maker(node.name)
            if maker and maker not in taken:
                node.name = maker
    _name_values(after)


def _layer(node: NodeProto, scope: str, modules: Mapping[str, bool], names: _Names) -> str:
    if node.op_type not in WEIGHTED:
        return ""
    weight = node.input[1]
    owner = next((path for path in names.owners(weight) if modules.get(path)), "")
    # Exporters merge equal weights, so one that is used twice may be called after another layer.
    if owner and names.uses[weight] == 1:
        return owner
    # The product of two activations inside an attention layer belongs to no layer's weight.
    if modules.get(scope) and (node.op_type != "MatMul" or any(map(names.is_weight, node.input))):
        return scope
    return owner


def _argument(node: NodeProto, layers: Mapping[str, str]) -> str:
    operation = next((entry.value for entry in node.metadata_props if entry.key == OPERATION), "")
    weights = re.findall(r"%(\w+)", operation) if node.op_type in WEIGHTED else ()
    return next((layers[name] for name in weights if name in layers), "")


def _scope(node: NodeProto, modules: Mapping[str, bool]) -> str:
    """The innermost module that ran a node: from one exporter's metadata, from the other's node names."""
    for entry in node.metadata_props:
        if entry.key == SCOPES:
            scopes = ast.literal_eval(entry.value)
            return next((path for path in reversed(scopes) if path and path in modules), "")
    path = ""
    for part in node.name.split("/")[:-1]:
        # The TorchScript exporter writes "layer1/layer1.0", and "relu_1" at the second call of a module.
        name = part.rpartition(".")[2]
        calls = [f"{path}.{form}".strip(".") for form in (name, re.sub(r"_\d+$", "", name)) if form]
        path = next((call for call in calls if call in modules), path)
    return path


def _without(prefix: str, name: str) -> str:
    return name.removeprefix(prefix) or name


def _apply(graph: GraphProto, new: Mapping[str, str]) -> None:
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [new.get(name, name) for name in names]
        for body in subgraphs(node):
            local = defined_names(body)
            _apply(body, {old: name for old, name in new.items() if old not in local})


def _clean(message: Message) -> None:
    for name in ("doc_string", "metadata_props"):
        if name in message.DESCRIPTOR.fields_by_name:
            message.ClearField(name)
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in [value] if isinstance(value, Message) else value:
                _clean(part)


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name
