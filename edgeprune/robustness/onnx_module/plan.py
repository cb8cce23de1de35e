"""What an ONNX graph computes, as steps in their order: numbers folded, Q/DQ pairs joined, values freed after use."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, inliner, numpy_helper
from torch import Tensor

from edgeprune.errors import UnsupportedModel
from edgeprune.models import FORWARD_ERRORS, reason
from edgeprune.onnx_graph import ONNX_ERRORS
from edgeprune.robustness.onnx_module.elementwise import OPERATORS
from edgeprune.robustness.onnx_module.fake_quantize import (
    BACK,
    KNOWN,
    LIMITS,
    QUANTIZERS,
    SMOOTH,
    Inputs,
    Node,
    Operator,
    limited,
    refuse,
)
from edgeprune.robustness.onnx_module.layers import LAYERS
from edgeprune.robustness.onnx_module.shape_ops import VIEWS

TABLE: Mapping[str, Operator] = {**OPERATORS, **VIEWS, **LAYERS, **QUANTIZERS}
# Domains of ONNX itself, and ONNX Runtime's for the operators that it had first.
STANDARD = ("", "ai.onnx")
BORROWED: Mapping[str, Sequence[str]] = {"com.microsoft": ("QuantizeLinear", "DequantizeLinear", "Gelu")}
# Nodes whose second input is a shape, with the file's batch in it where that is fixed.
SHAPED = ("Reshape", "Expand")
# Sizes, limits, scales: as many numbers as an operator may want to read. Weights are more.
READABLE = 64
WHOLE = frozenset((*LIMITS, TensorProto.INT64, TensorProto.UINT32, TensorProto.UINT64))


@dataclass(frozen=True)
class Step:
    """A node, names of its inputs ("" is left out) and outputs, and the values that nobody needs after it."""

    node: Node
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    done: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Steps in their order and the numbers that they need, floats as float32 and whole numbers as int64.

    shape: of the input, 0 where it is free.
    """

    steps: tuple[Step, ...]
    numbers: Mapping[str, Tensor]
    input: str
    output: str
    shape: tuple[int, ...]


def is_quantized(model: ModelProto) -> bool:
    """Whether a file says explicitly that it computes in whole numbers: it has Q/DQ nodes."""
    return any(node.op_type in QUANTIZERS for node in model.graph.node)


def plan(model: ModelProto, *, rounding: bool) -> Plan:
    """The steps from the one input of a file to its first output.

    Args:
        rounding: False: activations are cut off at the ends of their ranges, and not rounded.
    """
    graph = _inlined(model)
    opset = max((o.version for o in model.opset_import if o.domain in STANDARD), default=1)
    numbers, kinds = _numbers(graph)
    images = [value for value in graph.input if value.name not in numbers]
    if len(images) != 1 or not graph.output:
        raise UnsupportedModel(f"the file has {len(images)} inputs, accepted is one image")
    steps: list[Step] = []
    for proto in _ordered(graph.node, {images[0].name, *numbers}):
        step = _step(proto, opset, kinds)
        scale = numbers.get(step.inputs[1]) if step.node.op == "QuantizeLinear" else None
        if scale is not None and not bool((scale.isfinite() & (scale > 0)).all()):
            raise refuse(step.node, f"its scale {step.inputs[1]!r} is not finite and more than 0")
        if all(name in numbers for name in step.inputs if name):
            made = compute(step.node, [numbers[name] if name else None for name in step.inputs])
            numbers.update(zip(step.outputs, (tensor.contiguous() for tensor in made), strict=False))
        else:
            steps.append(step)
    steps, names = _joined(steps, numbers, graph.output[0].name)
    output = names.get(graph.output[0].name, graph.output[0].name)
    if not rounding:
        steps = [_smooth(step) if step.node.op == "QuantizeLinear" else step for step in steps]
    steps = _needed(steps, output)
    used = {output, *(name for step in steps for name in step.inputs)}
    kept = {name: tensor for name, tensor in numbers.items() if name in used}
    shape = tuple(int(d.dim_value) for d in images[0].type.tensor_type.shape.dim)
    fixed = sum(shape[:1]) > 0
    steps = [_noted(step, kept, but=(1,) if fixed and step.node.op in SHAPED else ()) for step in steps]
    return Plan(_freeing(steps, kept, output), kept, images[0].name, output, shape)


def _inlined(model: ModelProto) -> GraphProto:
    if not model.functions:
        return model.graph
    try:
        return inliner.inline_local_functions(model).graph
    except ONNX_ERRORS as error:
        raise UnsupportedModel(f"the functions of the file can't be put in: {reason(error)}") from error


def compute(node: Node, x: Inputs) -> tuple[Tensor, ...]:
    """The outputs of a node."""
    try:
        made = TABLE[node.op](node, x)
    except FORWARD_ERRORS as error:
        shapes = ", ".join("none" if t is None else str(tuple(t.shape)) for t in x)
        raise UnsupportedModel(
            f"{node.op} {node.name!r} of the file fails in torch on {shapes}: {reason(error)}"
        ) from error
    return made if isinstance(made, tuple) else (made,)


def _numbers(graph: GraphProto) -> tuple[dict[str, Tensor], dict[str, int]]:
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    tensors |= {n.output[0]: _constant(n) for n in graph.node if n.op_type == "Constant"}
    kinds = {name: tensor.data_type for name, tensor in tensors.items()}
    return {name: _tensor(name, tensor) for name, tensor in tensors.items()}, kinds


def _ordered(nodes: Iterable[NodeProto], known: Collection[str]) -> list[NodeProto]:
    """The nodes that make something new, each behind those whose outputs it needs; ONNX Runtime asks for no order."""
    left = [node for node in nodes if node.output[0] not in known]
    have, found = {"", *known}, list[NodeProto]()
    while left:
        waiting: list[NodeProto] = []
        for node in left:
            if have.issuperset(node.input):
                found.append(node)
                have.update(node.output)
            else:
                waiting.append(node)
        if len(waiting) == len(left):
            missing = next(name for name in left[0].input if name not in have)
            what = f"{left[0].op_type} {left[0].name or left[0].output[0]!r}"
            raise UnsupportedModel(f"{what} of the file needs {missing!r}, which nothing makes")
        left = waiting
    return found


def _constant(node: NodeProto) -> TensorProto:
    given = node.attribute[0]
    found = helper.get_attribute_value(given)
    if given.name == "value":
        return found
    kinds = {
        "value_float": np.float32,
        "value_floats": np.float32,
        "value_int": np.int64,
        "value_ints": np.int64,
    }
    if given.name not in kinds:
        raise UnsupportedModel(f"Constant {node.name or node.output[0]!r} of the file holds {given.name}")
    return numpy_helper.from_array(np.asarray(found, kinds[given.name]))


def _tensor(name: str, tensor: TensorProto) -> Tensor:
    try:
        array = numpy_helper.to_array(tensor)
    except (ValueError, TypeError, OSError) as error:
        raise UnsupportedModel(f"the numbers {name!r} of the file can't be read: {error}") from error
    if tensor.data_type == TensorProto.STRING:
        raise UnsupportedModel(f"the file holds text, {name!r}")
    boolean = tensor.data_type == TensorProto.BOOL
    kind = np.bool_ if boolean else np.int64 if tensor.data_type in WHOLE else np.float32
    return torch.from_numpy(np.array(array, dtype=kind))


def _step(proto: NodeProto, opset: int, kinds: Mapping[str, int]) -> Step:
    """A node of the file, if it is known. kinds: types of the numbers."""
    name = proto.name or proto.output[0]
    known = TABLE if proto.domain in STANDARD else BORROWED.get(proto.domain, ())
    if proto.op_type not in known:
        domain = f"{proto.domain}." if proto.domain else ""
        raise UnsupportedModel(f"{domain}{proto.op_type} {name!r} of the file has no form in torch here")
    outputs = tuple(proto.output)
    while outputs and not outputs[-1]:
        outputs = outputs[:-1]
    options = {given.name: _option(name, given) for given in proto.attribute}
    node = Node(proto.op_type, name, options, opset, len(outputs))
    if node.op == "QuantizeLinear":
        zero = proto.input[2] if len(proto.input) > 2 else ""
        node = limited(node, kinds.get(zero, 0) or int(node.get("output_dtype", 0)) or TensorProto.UINT8)
    return Step(node, tuple(proto.input), outputs)


def _option(name: str, given: AttributeProto) -> Any:
    value = helper.get_attribute_value(given)
    return _tensor(name, value) if isinstance(value, TensorProto) else value


def _joined(
    steps: Sequence[Step], numbers: Mapping[str, Tensor], output: str
) -> tuple[list[Step], dict[str, str]]:
    """Each QuantizeLinear that is only dequantized again, as one step; and what the values are called then."""
    users: dict[str, list[Step]] = defaultdict(list)
    for step in steps:
        for name in step.inputs:
            users[name].append(step)
    alike = {
        step.outputs[0]
        for step in steps
        if step.node.op == "QuantizeLinear"
        and step.outputs[0] != output
        and all(_undoes(user, step, numbers) for user in users[step.outputs[0]])
    }
    names: dict[str, str] = {}
    found: list[Step] = []
    for step in steps:
        inputs = tuple(names.get(name, name) for name in step.inputs)
        if step.node.op == "DequantizeLinear" and step.inputs[0] in alike:
            names[step.outputs[0]] = step.inputs[0]
        elif step.outputs[0] in alike:
            node = replace(step.node, options={**step.node.options, BACK: True})
            found.append(replace(step, node=node, inputs=inputs))
        else:
            found.append(replace(step, inputs=inputs))
    return found, names


def _undoes(step: Step, quantizer: Step, numbers: Mapping[str, Tensor]) -> bool:
    if step.node.op != "DequantizeLinear" or step.inputs[0] != quantizer.outputs[0]:
        return False
    options = [(n.get("axis", 1), n.get("block_size", 0)) for n in (step.node, quantizer.node)]
    for place in (1, 2):
        mine, other = (s.inputs[place] if len(s.inputs) > place else "" for s in (step, quantizer))
        if mine != other and not (
            mine in numbers and other in numbers and torch.equal(numbers[mine], numbers[other])
        ):
            return False
    return options[0] == options[1]


def _smooth(step: Step) -> Step:
    return replace(step, node=replace(step.node, options={**step.node.options, SMOOTH: True}))


def _noted(step: Step, numbers: Mapping[str, Tensor], but: Collection[int] = ()) -> Step:
    """With those of its inputs that are a few numbers as Python has them. but: places of others."""
    known = {
        place: numbers[name].reshape(-1).tolist()
        for place, name in enumerate(step.inputs)
        if name in numbers and place not in but and numbers[name].numel() <= READABLE
    }
    return replace(step, node=replace(step.node, options={**step.node.options, KNOWN: known}))


def _needed(steps: Sequence[Step], output: str) -> list[Step]:
    wanted, found = {output}, list[Step]()
    for step in reversed(steps):
        if wanted.intersection(step.outputs):
            wanted.update(step.inputs)
            found.append(step)
    return found[::-1]


def _freeing(steps: Sequence[Step], numbers: Iterable[str], output: str) -> tuple[Step, ...]:
    kept, found = {output, "", *numbers}, list[Step]()
    for step in reversed(steps):
        last = {*step.inputs, *step.outputs} - kept
        kept |= last
        found.append(replace(step, done=tuple(sorted(last))))
    return tuple(found[::-1])
