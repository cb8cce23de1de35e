"""An ONNX graph as maps: who makes a value, who reads it, which are constant, what shape and type each has."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from google.protobuf.message import DecodeError, EncodeError, Message
from onnx import (
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    external_data_helper,
    helper,
    numpy_helper,
    version_converter,
)

from edgeprune.errors import ModelError, UnsafeModel, UnsupportedModel, UsageError
from edgeprune.models import reason

# What onnx, protobuf and onnxslim raise on a file or a model that they can't handle.
ONNX_ERRORS = (
    onnx.checker.ValidationError,
    onnx.shape_inference.InferenceError,
    version_converter.ConvertError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    DecodeError,
    EncodeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


def defined_names(graph: GraphProto) -> set[str]:
    """All values that a graph defines, its bodies included."""
    own = {value.name for value in (*graph.input, *graph.initializer)}
    return own | {name for node in all_nodes(graph) for name in node.output}


def all_nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """The nodes of a graph and of the bodies inside of it."""
    for node in graph.node:
        yield node
        for body in subgraphs(node):
            yield from all_nodes(body)


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    """The bodies of a node: of an If, a Loop or a Scan."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def freed(model: ModelProto) -> ModelProto:
    """A copy whose batch is free, also where a Reshape to a constant shape says its size.

    Whether it answers each image as the file does is for the caller to see: other operators may hold the size, too.
    """
    copy = copied(model)
    graph = copy.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    size = batch_of(model)
    for value in (*graph.input, *graph.output):
        dims = value.type.tensor_type.shape.dim
        if value.name not in constants and len(dims):
            dims[0].dim_param = "batch"
    del graph.value_info[:]
    for node in graph.node:
        shape = constants.get(node.input[1]) if node.op_type == "Reshape" and len(node.input) > 1 else None
        if shape is None:
            continue
        wanted = numpy_helper.to_array(shape).copy()
        if not len(wanted) or wanted[0] != size:
            continue
        # In a Reshape -1 is the size that is left over, which one place may have, and 0 the size that the input has
        # there, unless allowzero says that it is no size.
        wanted[0] = 0 if -1 in wanted else -1
        if not wanted[0]:
            kept = [a for a in node.attribute if a.name != "allowzero"]
            del node.attribute[:]
            node.attribute.extend(kept)
        name = f"{shape.name}.free_batch"
        if name not in constants:
            constants[name] = numpy_helper.from_array(wanted, name)
            graph.initializer.append(constants[name])
        node.input[1] = name
    return copy


def batch_of(model: ModelProto) -> int | None:
    """The fixed batch of a model's image input, or None where it is free."""
    return inputs_of(model)[0].type.tensor_type.shape.dim[0].dim_value or None


def opset_of(model: ModelProto) -> int:
    """The version of the standard operators that a model imports; 0 when it imports none."""
    return next((item.version for item in model.opset_import if item.domain in ("", "ai.onnx")), 0)


HINT = "give an .onnx file or a finished run directory; `edgeprune compress` and `why` take PyTorch models"
# Of a graph with its functions put in, and how deep they may call each other: as deep as onnx accepts.
_MOST_NODES, _DEEPEST = 10**6, 100
_BESIDE = (
    "copy the ONNX file and its data files into one folder, or save all in one file with the onnx package"
)


def opened(path: Path, *, weights: bool = True) -> ModelProto:
    """The model of an ONNX file, with the numbers that lie in files beside it."""
    model = _parsed(path)
    tensors = [t for t in _tensors(model) if t.data_location == TensorProto.EXTERNAL]
    for tensor in tensors:
        _check_data(tensor, path)
    try:
        for tensor in tensors if weights else ():
            external_data_helper.load_external_data_for_tensor(tensor, str(path.parent))
    except ONNX_ERRORS as error:
        raise ModelError(f"the data of {path} can't be read: {error}") from error
    return model


def data_files(path: Path) -> dict[str, Path]:
    """The files beside an ONNX file that hold its numbers, by what the file calls them; none for any other file."""
    if path.suffix != ".onnx" or not path.is_file():
        return {}
    try:
        model = _parsed(path)
    except UsageError:  # whoever runs it says what is wrong with it
        return {}
    tensors = [t for t in _tensors(model) if t.data_location == TensorProto.EXTERNAL]
    for tensor in tensors:
        _check_data(tensor, path)
    names = dict.fromkeys(_entry(tensor.external_data, "location") for tensor in tensors)
    return {name: path.parent / name for name in names}


def moved(path: Path, places: Mapping[str, str]) -> bytes:
    """An ONNX file whose data files have other names. places: the old name of each -> the new one."""
    model = opened(path, weights=False)
    for tensor in _tensors(model):
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = places[entry.value]
    return model.SerializeToString()


def _parsed(path: Path) -> ModelProto:
    model = ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
        for _ in _tensors(model):
            pass
    except UnicodeDecodeError as error:
        name = error.object.decode("utf-8", "backslashreplace")
        raise UsageError(
            f"{path} has the name '{name}', which is not UTF-8", "export the file again"
        ) from error
    except ONNX_ERRORS as error:
        raise UsageError(f"{path} is not a readable ONNX file: {error}", HINT) from error
    if not model.graph.node:
        raise UsageError(f"{path} is not a readable ONNX file: there is no graph in it", HINT)
    if (
        model.functions
        and _size(model.graph, {(f.domain, f.name): f for f in model.functions}, {}) > _MOST_NODES
    ):
        raise UnsupportedModel(
            f"{path} has functions that call each other: more than {_MOST_NODES} nodes, or {_DEEPEST} deep, when they "
            "are put in",
            "export it again without functions",
        )
    return model


def _size(part: Any, functions: Mapping[Any, Any], known: dict[Any, int], depth: int = 0) -> int:
    """How many nodes a graph or a function has with its functions put in; more than accepted where it calls itself."""
    total = len(part.node)
    for node in part.node if depth <= _DEEPEST else ():
        key = (node.domain, node.op_type)
        if key in functions and key not in known:
            known[key] = _size(functions[key], functions, known, depth + 1)
        total += known.get(key, 0)
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                total += _size(body, functions, known, depth + 1)
    return min(total, _MOST_NODES + 1) if depth <= _DEEPEST else _MOST_NODES + 1


def _tensors(message: Message) -> Iterator[TensorProto]:
    """All tensors in a message; every name is read on the way, which fails on one that is not UTF-8."""
    if isinstance(message, TensorProto):
        yield message
    for field, value in message.ListFields():
        if field.type == field.TYPE_STRING:
            for text in [value] if isinstance(value, (str, bytes)) else value:
                if isinstance(text, bytes):  # what protobuf gives where it is not UTF-8
                    text.decode("utf-8")
        elif field.message_type is not None:
            for part in [value] if isinstance(value, Message) else value:
                yield from _tensors(part)


def _entry(place: Any, key: str) -> str:
    return next((entry.value for entry in place if entry.key == key), "")


def _check_data(tensor: TensorProto, path: Path) -> None:
    location, what = _entry(tensor.external_data, "location"), f"{path}: the data of {tensor.name!r}"
    inside, file = PurePosixPath(location), path.parent / location
    steps = [path.parent.joinpath(*inside.parts[: i + 1]) for i in range(len(inside.parts))]
    if not steps or inside.is_absolute() or ".." in inside.parts or "\\" in location or "\0" in location:
        raise UnsafeModel(
            f"{what} lie at {location!r}; accepted is a file in the folder of the ONNX file", _BESIDE
        )
    if any(step.is_symlink() for step in steps):
        raise UnsafeModel(f"{what} lie at {location!r}, which is a symbolic link", _BESIDE)
    if not file.is_file():
        raise UsageError(f"{what} are in the file {location!r}, which is not in {path.parent}", _BESIDE)
    try:
        offset = int(_entry(tensor.external_data, "offset") or 0)
        length = int(_entry(tensor.external_data, "length") or file.stat().st_size - offset)
        needed = prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{what} can't be found in {location!r}: {error}") from error
    # Two numbers of 4 bits share a byte.
    packed = tensor.data_type in (TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1)
    least = -(-needed // 2) if packed else needed
    if min(offset, length) < 0 or offset + length > file.stat().st_size or length < least:
        raise ModelError(
            f"{what} are {least} bytes from byte {offset} of {location!r} on, which has {file.stat().st_size}",
            "copy the file again: it is not whole, or of another model",
        )


Array = npt.NDArray[Any]
Shape = tuple[int | None, ...]
# How a Constant node may hold its value, and of what type it is then; "value" says that itself.
_CONSTANTS: Mapping[str, Any] = {
    "value": None, "value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64,
}  # fmt: skip


class View:
    """The main graph of a model as it is now; make another one after changing the graph."""

    def __init__(self, model: ModelProto) -> None:
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
        """Value -> its element type and its shape, None for what is free or unknown."""
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

    def only_reader(self, name: str) -> NodeProto | None:
        """The node that reads a value, when there is exactly one and the value is no output of the model."""
        return self.readers[name][0] if name in self.readers and self.uses(name) == 1 else None

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


def unique(wish: str, taken: set[str]) -> str:
    """`wish`, or the first of wish@2, wish@3, ... that is not taken; it is taken then."""
    name, count = wish, 1
    while name in taken:
        count += 1
        name = f"{wish}@{count}"
    taken.add(name)
    return name


def value_names(graph: GraphProto) -> set[str]:
    """Every name that a value of the graph has, those inside the bodies of its nodes included."""
    names = {item.name for item in (*graph.initializer, *graph.input, *graph.output)}
    for node in graph.node:
        names.update(node.output)
        names.update(_read(node))
        for body in subgraphs(node):
            names |= value_names(body)
    return names


def _read(node: NodeProto) -> Iterator[str]:
    yield from (name for name in node.input if name)
    for body in subgraphs(node):
        yield from (value.name for value in body.output)
        for inner in body.node:
            yield from _read(inner)
