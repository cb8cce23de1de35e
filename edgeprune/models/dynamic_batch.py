"""A program exported for one batch size, made to work with any: only where running it proves that it does.

Such a program has the batch size written into its reshapes. Where the batch lies in each tensor is followed from the
input on, by running the program with more images; a size that it reaches is replaced by the input's own. Sizes that
are 1 leave choices, so the result is kept only if every image of a larger batch has the output that it has alone.
"""

import operator
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from edgeprune.errors import not_short
from edgeprune.models.torch_export import FORWARD_ERRORS

_RESHAPES = ("aten::view", "aten::reshape", "aten::_unsafe_view", "aten::_reshape_copy")
_SPREADING = ("aten::expand", "aten::repeat")
_FACTORIES = ("aten::zeros", "aten::ones", "aten::full", "aten::empty")
_NEW = ("aten::new_zeros", "aten::new_ones", "aten::new_full", "aten::new_empty")
_TIMES = 3


def free_batch(
    module: Any, graph: fx.Graph, shape: tuple[int, ...], compile_: Callable[[Any, fx.Graph], None]
) -> None:
    """Make `module` work with any batch size if that can be proven; sets `fixed_batch` to None when it could."""
    if _works(module, shape):
        module.fixed_batch = None
        return
    for factories in (False, True):
        freed = fx.Graph()
        freed.output(freed.graph_copy(graph, {}))
        images = _images(module, (_TIMES * shape[0], *shape[1:]))
        try:
            with torch.no_grad():
                _Follower(module, freed, shape[0], factories).replace_sizes(images)
        except FORWARD_ERRORS:
            not_short()
            continue
        compile_(module, freed)
        if _works(_lively(module), shape, tell_apart=True):
            module.fixed_batch = None
            return
    compile_(module, graph)


def _works(module: nn.Module, shape: tuple[int, ...], *, tell_apart: bool = False) -> bool:
    images = _images(module, (_TIMES * shape[0], *shape[1:]))
    with torch.no_grad():
        try:
            parts = [module(part) for part in images.split(shape[0])]
            if not all(isinstance(out, Tensor) and out.shape[:1] == shape[:1] for out in parts):
                return False
            if tell_apart and torch.equal(parts[0], parts[1]):
                return False
            expected = torch.cat(parts)
            return all(_same(module(images[:n]), expected[:n]) for n in (1, 2 * shape[0], _TIMES * shape[0]))
        except FORWARD_ERRORS:
            not_short()
            return False


def _lively(module: nn.Module) -> nn.Module:
    """A copy whose constant parameters are random: the last layer of a new network is often zero."""
    copy = deepcopy(module)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in copy.parameters():
            if (
                parameter.numel() > 1
                and parameter.is_floating_point()
                and bool((parameter == parameter.flatten()[0]).all())
            ):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return copy


def _images(module: nn.Module, shape: tuple[int, ...]) -> Tensor:
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(like.dtype)


def _same(out: Any, expected: Tensor) -> bool:
    return (
        isinstance(out, Tensor)
        and out.shape == expected.shape
        and torch.allclose(out, expected, rtol=1e-3, atol=1e-5 + 1e-4 * float(expected.abs().max()))
    )


@dataclass
class _Follower:
    """Runs a graph with more images than it was made for, and replaces sizes as it goes."""

    module: nn.Module
    graph: fx.Graph
    batch: int
    factories: bool
    values: dict[fx.Node, Any] = field(default_factory=dict)
    # Of a batch that was merged into an axis: how many entries of that axis lie outside of it.
    outside: dict[fx.Node, int] = field(default_factory=dict)

    def replace_sizes(self, images: Tensor) -> None:
        """Write the batch size of the input for the literal one, wherever the batch gets to."""
        source = next(n for n in self.graph.nodes if n.op == "placeholder")
        with self.graph.inserting_after(source):
            size = self.graph.call_function(torch.ops.aten.sym_size.int, (source, 0))
        self.values = {source: images, size: len(images)}
        for node in list(self.graph.nodes):
            if node in self.values or node.op == "output":
                continue
            carrier = next((n for n in node.all_input_nodes if self._axis(n) is not None), None)
            self.outside[node] = self.outside.get(carrier, 1) if carrier else 1
            if node.op == "call_function":
                self._replace_size(node, size)
            self.values[node] = self._value(node)

    def _axis(self, node: fx.Node) -> int | None:
        """The axis in which there is more of the tensor now than the program says; None when there is none."""
        now, made = self.values.get(node), node.meta.get("val")
        if not isinstance(now, Tensor) or not isinstance(made, Tensor) or now.ndim != made.ndim:
            return None
        grown = [i for i in range(now.ndim) if now.shape[i] != made.shape[i]]
        return grown[0] if len(grown) == 1 and now.shape[grown[0]] == _TIMES * made.shape[grown[0]] else None

    def _replace_size(self, node: fx.Node, size: fx.Node) -> None:
        name = node.target._schema.name if isinstance(node.target, torch._ops.OpOverload) else ""
        position = 1 if name in (*_RESHAPES, *_SPREADING, *_NEW) else 0 if name in _FACTORIES else None
        sizes = node.args[position] if position is not None and len(node.args) > position else None
        if position is None or not isinstance(sizes, (list, tuple)) or not sizes:
            return
        axis = self._target_axis(node, name, sizes)
        literal = sizes[axis] if axis is not None else None
        if axis is None or not isinstance(literal, int) or literal < 1 or literal % self.batch:
            return
        first: Any = size
        if literal > self.batch:
            with self.graph.inserting_before(node):
                first = self.graph.call_function(operator.mul, (size, literal // self.batch))
            self.values[first] = self.values[size] * (literal // self.batch)
        if name in ("aten::view", "aten::_unsafe_view"):
            # What lay in memory as a view of one image need not with more of them.
            node.target = torch.ops.aten.reshape.default
        changed = [*sizes[:axis], first, *sizes[axis + 1 :]]
        node.args = (*node.args[:position], changed, *node.args[position + 1 :])

    def _target_axis(self, node: fx.Node, name: str, sizes: Sequence[Any]) -> int | None:
        source: Any = node.args[0]
        axis = self._axis(source) if isinstance(source, fx.Node) and name not in _NEW else None
        if axis is None:
            # Spread out over the batch, or made for it, without an image in it.
            return 0 if name in _SPREADING or (self.factories and name in (*_FACTORIES, *_NEW)) else None
        if name in _SPREADING:
            return axis + len(sizes) - self.values[source].ndim if name == "aten::expand" else None
        made, wanted = source.meta["val"].shape, node.meta["val"].shape
        found = _landing(prod(made[:axis]) * self.outside[source], wanted, self.batch)
        if found is not None:
            self.outside[node] = found[1]
        return found[0] if found else None

    def _value(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            path, _, leaf = str(node.target).rpartition(".")
            return getattr(self.module.get_submodule(path), leaf)
        arguments = map_arg(node.args, self.values.__getitem__)
        keywords = map_arg(node.kwargs, self.values.__getitem__)
        called = self.module.get_submodule(str(node.target)) if node.op == "call_module" else node.target
        return called(*arguments, **keywords)  # type: ignore[operator]


def _landing(before: int, shape: Sequence[int], batch: int) -> tuple[int, int] | None:
    starts = [prod(shape[:i]) for i in range(len(shape))]
    # A last axis is the channels, so a batch that fits before it belongs to the axis before.
    for i, (start, size) in enumerate(zip(starts, shape, strict=True)):
        if start == before and size % batch == 0 and (i < len(shape) - 1 or len(shape) == 1):
            return i, 1
    for i, (start, size) in enumerate(zip(starts, shape, strict=True)):
        if before % start == 0 and size % (before // start * batch) == 0:
            return i, before // start
    return None
