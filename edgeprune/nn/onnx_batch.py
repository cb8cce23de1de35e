"""An ONNX file that was exported for a fixed number of images, made to take any number."""

from __future__ import annotations

from onnx import ModelProto, numpy_helper


def freed(model: ModelProto) -> ModelProto:
    """A copy whose batch is free, also where a Reshape to a constant shape says its size.

    Whether it answers each image as the file does is for the caller to see: other operators may hold the size, too.
    """
    copy = ModelProto()
    copy.CopyFrom(model)
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
    constants = {tensor.name for tensor in model.graph.initializer}
    first = next(value for value in model.graph.input if value.name not in constants)
    return first.type.tensor_type.shape.dim[0].dim_value or None
