"""A program exported for one batch size, made to work with any: only where running it proves that it does.

Such a program has the batch size written into its reshapes. Whether a 1 in a reshape is the batch or just a 1 can't be
told from the graph, so the sizes are replaced, and the result is kept only if every image of a larger batch gets the
answer that it gets alone.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from edgeprune.nn.zoo import FOREIGN_ERRORS

_RESHAPES = (
    "aten::view",
    "aten::reshape",
    "aten::_unsafe_view",
    "aten::expand",
    "aten::repeat",
    "aten::_reshape_copy",
)
_OF_ANYTHING = ("aten::expand", "aten::repeat")
_FACTORIES = ("aten::zeros", "aten::ones", "aten::full", "aten::empty")
_NEW = ("aten::new_zeros", "aten::new_ones", "aten::new_full", "aten::new_empty")


def free_batch(
    module: Any, graph: fx.Graph, shape: tuple[int, ...], compile_: Callable[[Any, fx.Graph], None]
) -> None:
    """Make `module` work with any batch size if that can be proven; sets `module.batch` to None when it could.

    Args:
        module: has `batch`, the size that it was exported with; runs `graph`, in eval mode.
        graph: with one placeholder; not changed.
        shape: of the input, batch first.
        compile_: makes the module run a graph.
    """
    if _works(module, shape):
        module.batch = None
        return
    for factories in (False, True):
        freed = fx.Graph()
        freed.output(freed.graph_copy(graph, {}))
        _replace_sizes(freed, shape[0], factories=factories)
        compile_(module, freed)
        if _works(module, shape, tell_apart=True):
            module.batch = None
            return
    compile_(module, graph)


def _works(module: nn.Module, shape: tuple[int, ...], *, tell_apart: bool = False) -> bool:
    """Whether images in batches of other sizes get what they get in a batch of the exported size.

    With `tell_apart` different images must get different answers, or nothing is proven.
    """
    generator = torch.Generator().manual_seed(0)
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
    images = torch.rand((3 * shape[0], *shape[1:]), generator=generator).to(like.dtype)
    with torch.no_grad():
        try:
            parts = [module(part) for part in images.split(shape[0])]
            if not all(isinstance(out, torch.Tensor) and out.shape[:1] == shape[:1] for out in parts):
                return False
            if tell_apart and torch.equal(parts[0], parts[1]):
                return False
            expected = torch.cat(parts)
            return all(_same(module(images[:n]), expected[:n]) for n in (1, 2 * shape[0], 3 * shape[0]))
        except FOREIGN_ERRORS:
            return False


def _same(out: Any, expected: torch.Tensor) -> bool:
    return (
        isinstance(out, torch.Tensor)
        and out.shape == expected.shape
        and torch.allclose(out, expected, rtol=1e-3, atol=1e-5 + 1e-4 * float(expected.abs().max()))
    )


def _replace_sizes(graph: fx.Graph, batch: int, *, factories: bool) -> None:
    """Write the input's own batch size for the literal one in the reshapes of what is made from the input.

    A parameter that is spread out over the batch counts too; a new tensor only with `factories`.
    """
    source = next(n for n in graph.nodes if n.op == "placeholder")
    with graph.inserting_after(source):
        size = graph.call_function(torch.ops.aten.sym_size.int, (source, 0))
    carried = {source}
    for node in list(graph.nodes):
        name = _name(node)
        made = name in (*_FACTORIES, *_NEW)
        from_input = not made and any(n in carried for n in node.all_input_nodes)
        possible = from_input or name in _OF_ANYTHING or (made and factories)
        if (possible and _replace_size(graph, node, size, batch)) or from_input:
            carried.add(node)


def _name(node: fx.Node) -> str:
    return node.target._schema.name if isinstance(node.target, torch._ops.OpOverload) else ""


def _size_position(node: fx.Node) -> int | None:
    name = _name(node)
    return 1 if name in (*_RESHAPES, *_NEW) else 0 if name in _FACTORIES else None


def _replace_size(graph: fx.Graph, node: fx.Node, size: fx.Node, batch: int) -> bool:
    position = _size_position(node)
    if node.op != "call_function" or position is None or len(node.args) <= position:
        return False
    sizes = node.args[position]
    if (
        not isinstance(sizes, (list, tuple))
        or not sizes
        or not isinstance(sizes[0], int)
        or sizes[0] < 1
        or sizes[0] % batch
    ):
        return False
    times, first = sizes[0] // batch, size
    if times > 1:
        with graph.inserting_before(node):
            first = graph.call_function(operator.mul, (size, times))
    if node.target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
        # What lay in memory as a view of one image need not with more of them.
        node.target = torch.ops.aten.reshape.default
    node.args = (*node.args[:position], [first, *sizes[1:]], *node.args[position + 1 :])
    return True
