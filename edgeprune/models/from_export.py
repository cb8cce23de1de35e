"""An exported graph back into nn.Modules with the network's own names, so that it can be pruned, trained and saved.

torch.export leaves a flat list of operators over parameters. Here each operator that owns parameters becomes its layer
again, at the place in the tree that the parameters' names give; dropout becomes a module so that training has it back;
everything else stays a call of the operator. Same parameters, same operators: same outputs, to the bit.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from edgeprune.errors import UnsupportedModel
from edgeprune.models.dynamic_batch import free_batch
from edgeprune.models.export_layers import Layer, layer_of
from edgeprune.models.parametrizations import RANDOM, fold
from edgeprune.models.torch_export import module_path
from edgeprune.safe_loading import check_names

_STATE = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
_CHECKS_ONLY = (
    "_assert_scalar",
    "_assert_async",
    "_assert_tensor_metadata",
    "sym_constrain_range",
    "sym_constrain_range_for_size",
)


class ExportedNetwork(nn.Module):
    """A network made from an exported program: its layers under their names, and one function that runs them.

    `fixed_batch` is None when any batch size works, else the only one that does. `image_shape` is the (C, H, W)
    that it was exported for, None when the program leaves it open. `computed` are the weights that the program
    computed at every call, and that are plain parameters here.
    """

    computed: tuple[str, ...]
    fixed_batch: int | None
    image_shape: tuple[int, int, int] | None
    _run: Callable[[nn.Module, torch.Tensor], Any]

    def forward(self, x: torch.Tensor) -> Any:
        """Run the program. x: float32 (N, C, H, W)."""
        return self._run(self, x)


def remodulify(program: ExportedProgram) -> nn.Module:
    """Make modules of an exported program of one tensor input, in eval mode.

    Args:
        program: from torch.export.export or torch.export.load; its tensors are copied, not shared.

    Returns:
        A module with the state-dict names of the network that was exported. Where the program was exported with a
        fixed batch size that only its reshapes name, any batch size works (`fixed_batch` is None then).
    """
    state = _state_of(program)
    images = _user_input(program)
    module = ExportedNetwork()
    builder = _Builder(state, fx.Graph())
    named = set(state.name_of)
    dead = fold(list(program.graph.nodes), state.tensors, state.name_of, _caller)
    builder.read([node for node in program.graph.nodes if node not in dead], images)
    _output(program, builder)
    _place(module, state, builder.layers)
    check_names(module, "the program")
    builder.graph.eliminate_dead_code(_has_effect)
    batch, *shape = images.meta["val"].shape
    static = all(isinstance(n, int) for n in shape)
    module.eval()
    module.computed = tuple(dict.fromkeys(n for key, n in state.name_of.items() if key not in named))
    module.fixed_batch = batch if isinstance(batch, int) else None
    module.image_shape = (shape[0], shape[1], shape[2]) if static else None
    _compile(module, builder.graph)
    if module.fixed_batch is not None and static:
        free_batch(module, builder.graph, (batch, *shape), _compile)
    return module


@dataclass(frozen=True)
class _State:
    """The program's tensors: state-dict name -> tensor (shared when tied), and which placeholder means which."""

    tensors: dict[str, torch.Tensor]
    volatile: frozenset[str]
    name_of: dict[str, str]


@dataclass
class _Builder:
    state: _State
    graph: fx.Graph
    layers: dict[str, Layer] = field(default_factory=dict)
    new: dict[fx.Node, Any] = field(default_factory=dict)

    def read(self, nodes: list[fx.Node], user_input: fx.Node) -> None:
        """Translate every node of the program, in its order."""
        for node in nodes:
            if node is user_input:
                self.new[node] = self.graph.placeholder("x")
                self.new[node].meta = {"val": node.meta.get("val")}
            elif node.op == "call_function":
                self._call(node)
            elif node.op in ("get_attr", "call_module", "call_method"):
                raise UnsupportedModel(
                    f"the program holds a graph inside its graph ({node.target}), from control flow"
                )

    def _call(self, node: fx.Node) -> None:
        operator = getattr(node.target, "__name__", str(node.target)).split(".")[0]
        counts = operator == "add_" and self._name(node.args[0]).endswith("num_batches_tracked")
        if operator in _CHECKS_ONLY or (counts and not node.users):
            return
        layer = layer_of(node, self._tensor)
        path = self._path(node, layer) if layer else ""
        if layer and path:
            call = self.graph.call_module(path, (self.lookup(layer.source),))
            self.new[node] = (call,) if layer.several else call
        elif operator == "getitem" and isinstance(several := self.new.get(node.args[0]), tuple):  # type: ignore[arg-type]
            # A layer gives only the first of its operator's values; the others are statistics that it keeps itself.
            if node.args[1] == 0:
                self.new[node] = several[0]
        else:
            if operator.rstrip("_") in RANDOM:
                raise UnsupportedModel(
                    f"the program makes random numbers ({node.target})", "export the network in eval mode"
                )
            arguments, keywords = (map_arg(a, self.lookup) for a in (node.args, node.kwargs))
            self.new[node] = self.graph.call_function(node.target, arguments, keywords)  # type: ignore[arg-type]
        new = self.new.get(node)
        if isinstance(new, fx.Node):
            new.meta = {"val": node.meta.get("val")}

    def lookup(self, node: fx.Node) -> fx.Node:
        """The new node that stands for an old one; a parameter that is used directly gets its own."""
        if node not in self.new:
            name = self._name(node)
            if not name:
                raise UnsupportedModel(f"the program uses {node.name}, which is no tensor of the network")
            self.new[node] = self.graph.get_attr(name)
        return self.new[node]

    def _name(self, value: Any) -> str:
        return self.state.name_of.get(value.name, "") if isinstance(value, fx.Node) else ""

    def _tensor(self, value: Any) -> torch.Tensor | None:
        return self.state.tensors.get(self._name(value))

    def _path(self, node: fx.Node, layer: Layer) -> str:
        """Where the layer belongs; "" when its tensors are not a layer's of their own, or another layer has them."""
        if not layer.tensors:
            return self._free_path(node, layer)
        for path in (_caller(node), self._name(next(iter(layer.tensors.values()))).rpartition(".")[0]):
            same = all(
                self.state.tensors.get(f"{path}.{attribute}") is self._tensor(value)
                for attribute, value in layer.tensors.items()
            )
            if path and same and self.layers.setdefault(path, layer).config == layer.config:
                return path
        return ""

    def _free_path(self, node: fx.Node, layer: Layer) -> str:
        """A name for a layer without tensors: its own where the program has it and it is free."""
        stem = _caller(node)
        if not stem or any(name == stem or name.startswith(stem + ".") for name in self.state.tensors):
            stem = f"{stem}.{layer.config[0].lower()}".lstrip(".")
        for path in (stem, *(f"{stem}_{i}" for i in range(1, len(self.new) + 2))):
            taken = any(name == path or name.startswith(path + ".") for name in self.state.tensors)
            if not taken and self.layers.setdefault(path, layer).config == layer.config:
                return path
        return ""


def _has_effect(node: fx.Node) -> bool:
    mutates = isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
    return mutates or node.op in ("placeholder", "output", "call_module")


def _caller(node: fx.Node) -> str:
    path = module_path(node)
    return path if path.replace(".", "").replace("_", "").isalnum() else ""


def _state_of(program: ExportedProgram) -> _State:
    unique: dict[Any, torch.Tensor] = {}
    tensors: dict[str, torch.Tensor] = {}
    name_of: dict[str, str] = {}
    volatile: set[str] = set()
    given: dict[str, tuple[Any, bool]] = {
        k: (v, isinstance(v, nn.Parameter)) for k, v in program.state_dict.items()
    }
    for item in program.graph_signature.input_specs:
        if item.kind in (InputKind.CUSTOM_OBJ, InputKind.TOKEN):
            raise UnsupportedModel(
                f"the program holds an object that is no tensor ({item.target or item.kind.name})"
            )
        if item.kind not in _STATE or item.target is None:
            continue
        value = program.state_dict.get(item.target, program.constants.get(item.target))
        if not isinstance(value, torch.Tensor):
            raise UnsupportedModel(f"the program lacks its tensor {item.target!r}")
        given[item.target] = (value, item.kind is InputKind.PARAMETER)
        name_of[item.arg.name] = item.target
        if item.target not in program.state_dict:
            volatile.add(item.target)
    for name, (value, is_parameter) in given.items():
        tensors[name] = _copied(value, is_parameter, unique)
    return _State(tensors, frozenset(volatile), name_of)


def _copied(value: torch.Tensor, is_parameter: bool, unique: dict[Any, torch.Tensor]) -> torch.Tensor:
    key = (
        value.untyped_storage().data_ptr(),
        value.storage_offset(),
        value.shape,
        value.stride(),
        value.dtype,
        is_parameter,
    )
    if value.numel() == 0 or key not in unique:
        copy = value.detach().clone()
        # Overlapping strides (an expanded constant) can't be written to later.
        copy = (
            copy
            if copy.is_contiguous() or copy.is_contiguous(memory_format=torch.channels_last)
            else copy.contiguous()
        )
        unique[key] = nn.Parameter(copy, requires_grad=copy.is_floating_point()) if is_parameter else copy
    return unique[key]


def _user_input(program: ExportedProgram) -> fx.Node:
    placeholders = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    names = [
        item.arg.name
        for item in program.graph_signature.input_specs
        if item.kind is InputKind.USER_INPUT and not isinstance(item.arg, ConstantArgument)
    ]
    value = placeholders[names[0]].meta.get("val") if len(names) == 1 else None
    if not isinstance(value, torch.Tensor) or value.ndim != 4 or not value.is_floating_point():
        what = f"{len(names)} inputs ({', '.join(names)})"
        if isinstance(value, torch.Tensor):
            what = f"a {value.ndim}-dimensional tensor of {value.dtype}"
        raise UnsupportedModel(
            f"the program takes {what}, expected one batch of images: a float tensor (N, C, H, W)",
            "export the part of the network from images to logits",
        )
    return placeholders[names[0]]


def _place(module: nn.Module, state: _State, layers: Mapping[str, Layer]) -> None:
    """Grow the tree: a layer where one was recognized, a bare module elsewhere, then every tensor at its name."""
    for path in (*(name.rpartition(".")[0] for name in state.tensors), *layers):
        parent, here = module, ""
        for part in filter(None, path.split(".")):
            here = f"{here}.{part}".lstrip(".")
            if part not in parent._modules:
                parent.add_module(part, layers[here].make() if here in layers else nn.Module())
            parent = parent.get_submodule(part)
    for layer in (module.get_submodule(path) for path in layers):
        for table in (layer._parameters, layer._buffers):
            table.update(dict.fromkeys(table))
    for name, tensor in state.tensors.items():
        _register(module, name, tensor, persistent=name not in state.volatile)


def _register(module: nn.Module, name: str, tensor: torch.Tensor, *, persistent: bool) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(leaf, tensor)
    elif leaf in owner._parameters:
        # A layer's weight that was frozen into the program as a constant.
        owner.register_parameter(leaf, nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))
    else:
        owner.register_buffer(leaf, tensor, persistent=persistent)


def _output(program: ExportedProgram, builder: _Builder) -> None:
    node = next(n for n in program.graph.nodes if n.op == "output")
    values = [
        value
        for value, item in zip(node.args[0], program.graph_signature.output_specs, strict=True)  # type: ignore[arg-type]
        if item.kind is OutputKind.USER_OUTPUT
    ]
    new = [builder.lookup(v) if isinstance(v, fx.Node) else v for v in values]
    builder.graph.output(
        pytree.tree_unflatten(new, program.call_spec.out_spec) if program.call_spec.out_spec else tuple(new)
    )


def _compile(module: nn.Module, graph: fx.Graph) -> None:
    """Have torch.fx write the function that runs the graph, and keep only the function: the tree stays ours."""
    module._run = type(fx.GraphModule(module, graph)).forward  # type: ignore[assignment]
