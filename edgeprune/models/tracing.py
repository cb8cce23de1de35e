"""A network as a list of operator calls without side effects: what bounds, matching and repair walk over."""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from edgeprune.errors import UnsupportedModel
from edgeprune.models.torch_export import FORWARD_ERRORS, capture, module_path, quiet, reason
from edgeprune.records import InputSpec

_STATE = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
# torch takes batch-norm apart while it removes in-place operators; here it is one call again, with one output.
_BATCH_NORMS = ("_native_batch_norm_legit_no_training", "_native_batch_norm_legit")
_BATCH_NORM = torch.ops.aten.batch_norm.default


@dataclass(frozen=True)
class Ref:
    """The value of another call, or of the input, by its name."""

    name: str


@dataclass(frozen=True)
class Weight:
    """A parameter or a buffer by its state-dict name; what no state dict holds is in `Program.constants`."""

    name: str


@dataclass(frozen=True)
class Call:
    """One operator applied once.

    name: unique in the program.
    op: the operator without namespace, overload and trailing underscore: "conv2d", "batch_norm", "add", "getitem".
    args: in the order of the operator's schema, defaults filled in: Ref, Weight, constants; lists become tuples.
    shape: of the output for a batch of one; () when the output is a tuple of tensors.
    layer: path of the innermost module that made the call, such as "layer1.0.conv1"; "" when unknown.
    names: what the schema calls each of `args`.
    target: the operator itself, to run it.
    """

    name: str
    op: str
    args: tuple[Any, ...]
    shape: tuple[int, ...]
    layer: str
    names: tuple[str, ...] = ()
    target: Any = field(default=None, repr=False, compare=False)

    def arg(self, name: str) -> Any:
        """An argument by the schema's name for it: `call.arg("stride")`."""
        if name not in self.names:
            raise KeyError(f"{self.op} has no argument {name!r}, it has {', '.join(self.names)}")
        return self.args[self.names.index(name)]

    def run(self, args: Sequence[Any]) -> Any:
        """Run the operator on tensors that stand where `args` has names; other arguments as they are."""
        if not isinstance(self.target, torch._ops.OpOverload):
            return self.target(*args)
        schema = self.target._schema.arguments
        keywords = {a.name: v for a, v in zip(schema, args, strict=True) if a.kwarg_only}
        return self.target(*args[: len(args) - len(keywords)], **keywords)

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the calls (or the input) whose values it takes, in order, lists included."""
        return tuple(item.name for item in leaves(self.args) if isinstance(item, Ref))

    @property
    def weights(self) -> tuple[str, ...]:
        """State-dict names of the tensors that it takes, in order."""
        return tuple(item.name for item in leaves(self.args) if isinstance(item, Weight))


@dataclass(frozen=True)
class Program:
    """A network in eval mode: calls in an order in which they can be run, from one input to one output.

    input: name of the input's value. output: name of the value of its output.
    constants: tensors that no state dict holds (non-persistent buffers, literals). input_shape: (1, C, H, W).
    """

    input: str
    output: str
    calls: tuple[Call, ...]
    constants: Mapping[str, Tensor]
    input_shape: tuple[int, ...] = ()

    def users(self, name: str) -> tuple[Call, ...]:
        """The calls that take the value of a call or of the input."""
        return self._users.get(name, ())

    def call(self, name: str) -> Call:
        """A call by its name."""
        return self._by_name[name]

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Shape of the value of a call or of the input, for a batch of one."""
        return self.input_shape if name == self.input else self._by_name[name].shape

    def readers(self, weight: str) -> tuple[Call, ...]:
        """The calls that take a tensor of the state dict."""
        return tuple(c for c in self.calls if weight in c.weights)

    def after(self, names: frozenset[str]) -> tuple[Call, ...]:
        """The calls whose value depends on one of these, in order, themselves not counted."""
        reached, found = set(names), []
        for call in self.calls:
            if reached.intersection(call.reads):
                reached.add(call.name)
                found.append(call)
        return tuple(found)

    @cached_property
    def _by_name(self) -> dict[str, Call]:
        return {c.name: c for c in self.calls}

    @cached_property
    def _users(self) -> dict[str, tuple[Call, ...]]:
        found: dict[str, list[Call]] = {}
        for call in self.calls:
            for name in dict.fromkeys(call.reads):
                found.setdefault(name, []).append(call)
        return {name: tuple(calls) for name, calls in found.items()}


def trace(network: nn.Module, example: Tensor) -> Program:
    """Trace a bare network in eval mode, for a batch of one.

    In-place operators become their pure forms; what the output does not depend on is left out. Of several
    outputs the first one counts.
    """
    copy = deepcopy(network).cpu().float().eval()
    exported = capture(copy, InputSpec(tuple(example.shape[1:]), 0), dynamic_batch=False)  # type: ignore[arg-type]
    try:
        with quiet(), torch.no_grad():
            pure = exported.run_decompositions({})
    except FORWARD_ERRORS as error:
        raise UnsupportedModel(
            f"the network's in-place operators can't be removed: {reason(error)}",
            "rewrite it without in-place operators on views",
        ) from error
    return _program(pure)


def leaves(value: Any) -> Iterator[Any]:
    """The items of nested tuples, in order."""
    if isinstance(value, tuple):
        for item in value:  # type: ignore[union-attr]
            yield from leaves(item)
    else:
        yield value


def _program(exported: ExportedProgram) -> Program:
    specs = exported.graph_signature.input_specs
    states = {s.arg.name: str(s.target) for s in specs if s.kind in _STATE}
    inputs = [s.arg.name for s in specs if s.kind is InputKind.USER_INPUT]
    values: dict[fx.Node, Any] = {}
    calls: list[Call] = []
    nodes = list(exported.graph.nodes)
    for node in nodes:
        if node.op == "placeholder":
            values[node] = Weight(states[node.name]) if node.name in states else Ref(node.name)
        elif node.op == "call_function":
            values[node] = _value(node, values, calls)
    shape = next(_shape(n) for n in nodes if n.name == inputs[0])
    output = _output(exported, values)
    constants = {
        name: tensor.detach()
        for name, tensor in exported.constants.items()
        if isinstance(tensor, Tensor) and name in set(states.values()) and name not in exported.state_dict
    }
    return Program(inputs[0], output, _needed(calls, output), constants, shape)


def _value(node: fx.Node, values: Mapping[fx.Node, Any], calls: list[Call]) -> Ref:
    """The call that a node becomes, put on the list; a batch-norm's first output is its only one."""
    call = _call(node, values)
    if call.op == "getitem" and any(c.name == call.reads[0] and c.op == "batch_norm" for c in calls):
        return Ref(call.reads[0])
    calls.append(call)
    return Ref(call.name)


def _call(node: fx.Node, values: Mapping[fx.Node, Any]) -> Call:
    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload):
        args = tuple(_plain(a, values) for a in node.args)
        return Call(
            node.name,
            target.__name__,
            args,
            _shape(node),
            _layer(node),
            ("input", "index"),
            target,
        )
    schema = target._schema.arguments
    named = {a.name: v for a, v in zip(schema, node.args, strict=False)} | dict(node.kwargs)
    given = {a.name: _plain(named.get(a.name, a.default_value), values) for a in schema}
    op = target._schema.name.rpartition("::")[2]
    if op in _BATCH_NORMS:
        return _batch_norm(node, given)
    return Call(
        node.name,
        op.rstrip("_"),
        tuple(given.values()),
        _shape(node),
        _layer(node),
        tuple(given),
        target,
    )


def _batch_norm(node: fx.Node, given: Mapping[str, Any]) -> Call:
    """One call with the schema of aten::batch_norm, whatever torch made of it."""
    absent = {"running_mean": None, "running_var": None, "training": False, "cudnn_enabled": False}
    names = tuple(a.name for a in _BATCH_NORM._schema.arguments)
    args = {**absent, **given}
    first: Any = node.meta["val"][0]
    return Call(
        node.name.removeprefix("_native_").replace("_legit_no_training", ""),
        "batch_norm",
        tuple(args[n] for n in names),
        tuple(int(s) for s in first.shape),
        _layer(node),
        names,
        _BATCH_NORM,
    )


def _plain(value: Any, values: Mapping[fx.Node, Any]) -> Any:
    if isinstance(value, fx.Node):
        return values[value]
    if isinstance(value, (list, tuple)):
        return tuple(_plain(v, values) for v in value)
    return value


def _shape(node: fx.Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    return tuple(int(s) for s in value.shape) if isinstance(value, Tensor) else ()


def _layer(node: fx.Node) -> str:
    return module_path(node).split("@")[0]


def _output(exported: ExportedProgram, values: Mapping[fx.Node, Any]) -> str:
    last = next(n for n in exported.graph.nodes if n.op == "output")
    kinds = [s.kind for s in exported.graph_signature.output_specs]
    outputs = [v for v, kind in zip(last.args[0], kinds, strict=True) if kind is OutputKind.USER_OUTPUT]
    first = values.get(outputs[0]) if outputs else None
    if not isinstance(first, Ref):
        raise UnsupportedModel(
            "the network's output does not depend on its input", "wrap it so that forward() returns logits"
        )
    return first.name


def _needed(calls: list[Call], output: str) -> tuple[Call, ...]:
    wanted, kept = {output}, []
    for call in reversed(calls):
        if call.name in wanted:
            kept.append(call)
            wanted.update(call.reads)
    return tuple(reversed(kept))
