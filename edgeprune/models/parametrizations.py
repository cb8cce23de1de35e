"""Weights that a network computes from other parameters at every call: computed once, and plain parameters afterwards.

Under weight_norm, spectral_norm, orthogonal, a pruning mask or another parametrization a layer's weight is no parameter
of the network. Its output depends on all channels together, so none can be taken out of the tensors that it is made of.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_arg
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from edgeprune.models.export_layers import layer_of

RANDOM = (
    "bernoulli",
    "rand",
    "rand_like",
    "randn",
    "randn_like",
    "randint",
    "randperm",
    "uniform",
    "normal",
)


def compute_once(module: nn.Module) -> tuple[str, ...]:
    """Make plain parameters of the weights that parametrizations and hooks of torch.nn.utils compute, in place."""
    made: list[str] = []
    for path, part in list(module.named_modules()):
        hooks = [hook for hook in map(_by_hook, part._forward_pre_hooks.values()) if hook]
        for remove, name in hooks:
            remove(part, name)
        names = [name for _, name in hooks]
        if parametrize.is_parametrized(part):
            names += _unparametrize(part)
        made.extend(f"{path}.{name}".lstrip(".") for name in names)
    return tuple(made)


def detached(module: nn.Module) -> dict[int, Any]:
    """A memo for `copy.deepcopy`, which refuses the weights that a hook left behind at the last call."""
    values = [value for part in module.modules() for value in vars(part).values()]
    return {id(v): v.detach().clone() for v in values if isinstance(v, torch.Tensor) and not v.is_leaf}


def fold(
    nodes: Sequence[fx.Node],
    tensors: dict[str, torch.Tensor],
    name_of: dict[str, str],
    caller: Callable[[fx.Node], str],
) -> set[fx.Node]:
    """Compute once what the layers of an exported program get from its tensors alone.

    Args:
        tensors: state-dict name -> tensor. The computed ones take the place of those that they are made of.
    """
    fixed = _fixed(nodes, name_of)
    weights = _computed_weights(nodes, fixed, name_of, caller)
    while True:
        needed = _needed(nodes, fixed, weights)
        taken = {name_of[n.name] for n in needed if n.name in name_of}
        kept = {node: name for node, name in weights.items() if name not in taken}
        if len(kept) == len(weights):
            break
        weights = kept
    values: dict[fx.Node, Any] = {}
    found: dict[str, torch.Tensor] = {}
    for node, name in weights.items():
        value = _value(node, tensors, name_of, values)
        if not torch.equal(found.setdefault(name, value), value):
            return set()
    if not found:
        return set()
    gone = {name_of[n.name] for n in values if n.name in name_of}
    for name in gone - taken:
        del tensors[name]
    for name, value in found.items():
        copy = value.detach().clone(memory_format=torch.contiguous_format)
        tensors[name] = nn.Parameter(copy, requires_grad=copy.is_floating_point())
    name_of.update({node.name: name for node, name in weights.items()})
    return {node for node in fixed if node.op == "call_function"} - needed


def note(names: Sequence[str]) -> str:
    """The sentence for the reader about computed weights."""
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return (
        f"weights that the network computed at every call from other parameters (weight_norm, spectral_norm, or the "
        f"like) were computed once and are plain parameters now: {shown}"
    )


def _by_hook(hook: Any) -> tuple[Callable[[nn.Module, str], Any], str] | None:
    if isinstance(hook, WeightNorm):
        return remove_weight_norm, hook.name
    if isinstance(hook, SpectralNorm):
        return remove_spectral_norm, hook.name
    return (prune.remove, hook._tensor_name) if isinstance(hook, prune.BasePruningMethod) else None


def _unparametrize(part: Any) -> list[str]:
    """torch's own remove_parametrizations changes the class, which a copied module shares with the one it is of."""
    lists = dict(part.parametrizations)
    with torch.no_grad():
        values = {name: getattr(part, name).clone() for name in lists}
    part.__class__ = parametrize.type_before_parametrizations(part)
    del part._modules["parametrizations"]
    for name, value in values.items():
        if lists[name]._parameters:
            part.register_parameter(name, nn.Parameter(value, requires_grad=value.is_floating_point()))
        else:
            part.register_buffer(name, value)
    return list(values)


def _fixed(nodes: Sequence[fx.Node], name_of: Mapping[str, str]) -> set[fx.Node]:
    """The nodes that do not depend on the images: tensors of the program, and what is computed of them alone."""
    fixed: set[fx.Node] = set()
    for node in nodes:
        pure = isinstance(node.target, torch._ops.OpOverload) and not node.target._schema.is_mutable
        pure = pure and node.target._schema.name.partition("::")[2] not in RANDOM  # type: ignore[union-attr]
        computed = node.op == "call_function" and (pure or node.target is operator.getitem)
        if node.name in name_of or (computed and fixed.issuperset(node.all_input_nodes)):
            fixed.add(node)
    return fixed


def _computed_weights(
    nodes: Sequence[fx.Node],
    fixed: set[fx.Node],
    name_of: Mapping[str, str],
    caller: Callable[[fx.Node], str],
) -> dict[fx.Node, str]:

    def tensor_of(value: Any) -> torch.Tensor | None:
        return value.meta.get("val") if isinstance(value, fx.Node) and value in fixed else None

    weights: dict[fx.Node, str] = {}
    for node in nodes:
        layer = None if node in fixed or node.op != "call_function" else layer_of(node, tensor_of)
        for attribute, source in layer.tensors.items() if layer else ():
            path = caller(node) or _owner(source, name_of)
            inside = name_of.get(source.name, f"{path}.parametrizations.").startswith(
                f"{path}.parametrizations."
            )
            if path and inside:
                weights.setdefault(source, f"{path}.{attribute}")
    return weights


def _owner(source: fx.Node, name_of: Mapping[str, str]) -> str:
    while source.all_input_nodes:
        source = source.all_input_nodes[0]
    return name_of.get(source.name, "").partition(".parametrizations.")[0].rpartition(".")[0]


def _needed(nodes: Sequence[fx.Node], fixed: set[fx.Node], weights: Mapping[fx.Node, str]) -> set[fx.Node]:
    pending = [source for node in nodes if node not in fixed for source in node.all_input_nodes]
    needed: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        if node in fixed and node not in weights and node not in needed:
            needed.add(node)
            pending.extend(node.all_input_nodes)
    return needed


def _value(
    node: fx.Node, tensors: Mapping[str, torch.Tensor], name_of: Mapping[str, str], values: dict[fx.Node, Any]
) -> Any:
    if node not in values:
        if node.name in name_of:
            values[node] = tensors[name_of[node.name]]
        else:
            arguments, keywords = (
                map_arg(a, lambda n: _value(n, tensors, name_of, values)) for a in (node.args, node.kwargs)
            )
            with torch.no_grad():
                values[node] = node.target(*arguments, **keywords)  # type: ignore[operator,misc]
    return values[node]
