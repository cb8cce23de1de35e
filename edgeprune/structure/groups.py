"""Coupled channel groups of a network; the only importer of torch_pruning.

torch-pruning's `DependencyGraph` finds the coupled layers. Here its groups become records of tensors and positions
(`Group`, `Member`). `provable_groups` cuts every group on a copy and compares it with masking; a group that differs is
left out with the reason.
"""

import itertools
import warnings
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn
from torch_pruning import ops

from edgeprune import models
from edgeprune.errors import UnsupportedModel
from edgeprune.records import Group, Member

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
PER_CHANNEL = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.PReLU, nn.GroupNorm)


@dataclass(frozen=True)
class Graph:
    """What can be cut, and why the rest can't: group or layer name -> reason."""

    groups: tuple[Group, ...]
    left_out: dict[str, str]


# (state-dict name, axis, root channel -> positions, role)
_Entry = tuple[str, int, dict[int, list[int]], str]


class _NotCuttable(Exception):
    """Why one group can't be turned into tensors and positions."""


def find_groups(network: nn.Module, example: Tensor, skip: Sequence[str] = ()) -> Graph:
    """Every coupled group of channels that ends inside the network, before any proof."""
    copy = deepcopy(network).eval()
    for parameter in copy.parameters():
        parameter.requires_grad_(True)
    dependency = _dependency_graph(copy, example)
    names = {module: name for name, module in copy.named_modules()}
    groups: list[Group] = []
    left_out: dict[str, str] = {}
    covered: dict[str, set[int]] = {}
    for name, module in copy.named_modules():
        if not isinstance(module, (*CONVS, *TRANSPOSED, nn.Linear)):
            continue
        if module not in dependency.module2node:
            left_out[name] = "it does not take part in the output that was traced"
            continue
        free = [i for i in range(_out_channels(module)) if i not in covered.get(name, ())]
        if not free:
            continue
        items = _items(dependency, module, free)
        _cover(items, names, covered)
        try:
            _refuse_skipped(items, names, skip)
            group = _group(name, items, names, dependency)
        except _NotCuttable as reason:
            left_out[name] = str(reason)
            continue
        groups.append(group)
    return Graph(tuple(groups), left_out)


def provable_groups(network: nn.Module, graph: Graph, example: Tensor, seed: int) -> Graph:
    """Keep the groups for which cutting half of the channels equals masking them; the others are left out.

    The proof runs on a disturbed copy (`surgery.disturbed`), or a residual branch whose last scale is 0 would hide a
    wrong cut.
    """
    probe = models.disturbed(network, example, seed)
    masks = {g.name: _half(g, seed + i) for i, g in enumerate(graph.groups)}
    left_out = dict(graph.left_out)
    good = list(graph.groups)
    while True:
        bad = _culprits(probe, good, masks, example)
        if not bad:
            break
        left_out.update(bad)
        good = [g for g in good if g.name not in bad]
    if not good:
        reasons = (
            "; ".join(f"{k}: {v}" for k, v in list(left_out.items())[:5])
            or "it has no convolution or linear layer"
        )
        raise UnsupportedModel(
            f"no channel of this network can be removed: {reasons}",
            "run `edgeprune why MODEL` for the reason of every layer",
        )
    return Graph(tuple(good), left_out)


def _culprits(
    probe: nn.Module, groups: list[Group], masks: dict[str, Tensor], example: Tensor
) -> dict[str, str]:
    """Groups whose cut differs from their mask, found by halving; empty when all of them together agree."""
    failure = models.proof_failure(probe, groups, {g.name: masks[g.name] for g in groups}, example)
    if failure is None:
        return {}
    if len(groups) == 1:
        return {groups[0].name: failure}
    middle = len(groups) // 2
    found = _culprits(probe, groups[:middle], masks, example)
    found.update(_culprits(probe, groups[middle:], masks, example))
    # Two groups that are right alone and wrong together: give up the later half rather than guess.
    return found or {g.name: f"wrong together with other groups: {failure}" for g in groups[middle:]}


def _half(group: Group, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    keep = torch.ones(group.channels, dtype=torch.bool)
    keep[torch.randperm(group.channels, generator=generator)[: max(1, group.channels // 2)]] = False
    return keep


def _dependency_graph(copy: nn.Module, example: Tensor) -> Any:
    graph = torch_pruning.DependencyGraph()
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            return graph.build_dependency(copy, example_inputs=example, verbose=False)
    except models.FORWARD_ERRORS as error:
        raise UnsupportedModel(
            f"the layers of {type(copy).__name__} can't be traced for pruning: {type(error).__name__}: {error}",
            "the network must be differentiable from its input to its output and free of in-place tricks on outputs",
        ) from error


def _items(
    dependency: Any, module: nn.Module, channels: list[int]
) -> list[tuple[Any, bool, list[int], list[int]]]:
    pruner = dependency.get_pruner_of_module(module)
    group = dependency.get_pruning_group(module, pruner.prune_out_channels, channels)
    return [
        (
            item.dep.target.module,
            dependency.is_out_channel_pruning_fn(item.dep.handler),
            item.idxs,
            item.root_idxs,
        )
        for item in (group[i] for i in range(len(group)))
    ]


def _cover(items: Iterable[Any], names: dict[nn.Module, str], covered: dict[str, set[int]]) -> None:
    for module, out, positions, _ in items:
        if out and isinstance(module, (*CONVS, *TRANSPOSED, nn.Linear)) and module in names:
            covered.setdefault(names[module], set()).update(positions)


def _refuse_skipped(items: Iterable[Any], names: dict[nn.Module, str], skip: Sequence[str]) -> None:
    for module, out, _, _ in items:
        name = names.get(module, "") if isinstance(module, nn.Module) else ""
        hit = next((p for p in skip if out and name and fnmatch(name, p)), None)
        if hit:
            raise _NotCuttable(f"skipped by request ({hit!r})")


def _group(name: str, items: list[Any], names: dict[nn.Module, str], dependency: Any) -> Group:
    entries: list[_Entry] = []
    tied: list[list[int]] = []
    module: Any
    for module, out, positions, roots in items:
        if isinstance(module, ops._OutputOp):
            raise _NotCuttable("its channels are outputs of the network")
        owned: dict[int, list[int]] = {}
        for position, root in zip(positions, roots, strict=True):
            owned.setdefault(root, []).append(position)
        if isinstance(module, nn.GroupNorm):
            # Whole normalization groups go, so that the statistics of the others stay what they are.
            share = module.num_channels // module.num_groups
            tied += _tied_by(owned, lambda position, s=share: position // s)
        if isinstance(module, ops._SplitOp) and out:
            tied += _tied_by_split(owned, module.offsets)
        for tensor, axis, size, modulus, role in _tensors(module, out, names, dependency):
            if modulus:
                tied += _tied_by(owned, lambda position, m=modulus: position % m)
            folded = {
                root: [p % modulus if axis == 1 and modulus else p for p in ps] for root, ps in owned.items()
            }
            if any(p < 0 or p >= size for ps in folded.values() for p in ps):
                raise _NotCuttable(f"its channels do not line up with {tensor} ({size} entries)")
            entries.append((tensor, axis, folded, role))
    return _assemble(name, sorted({r for _, _, _, rs in items for r in rs}), entries, tied)


def _tied_by(owned: dict[int, list[int]], key: Callable[[int], int]) -> list[list[int]]:
    """Root channels that go together because `key` puts their positions in one class.

    In a grouped convolution those at the same place in each of its groups; in a group norm those of one group.
    """
    classes: dict[int, list[int]] = {}
    for root, positions in owned.items():
        for position in positions:
            classes.setdefault(key(position), []).append(root)
    return list(classes.values())


def _tied_by_split(owned: dict[int, list[int]], offsets: Sequence[int] | None) -> list[list[int]]:
    sizes = {b - a for a, b in itertools.pairwise(offsets or ())}
    if len(sizes) != 1 or not min(sizes):
        return []
    part = sizes.pop()
    return _tied_by(owned, lambda position: position % part)


def _assemble(name: str, roots: list[int], entries: list[_Entry], tied: list[list[int]]) -> Group:
    owner: dict[tuple[str, int, int], int] = {}
    ties = list(tied)
    for tensor, axis, owned, _ in entries:
        for root, positions in owned.items():
            ties += [[owner.setdefault((tensor, axis, position), root), root] for position in positions]
    units = _classes(roots, ties)
    if len(units) < 2:
        raise _NotCuttable("all of its channels are tied to each other")
    members: dict[tuple[str, int], tuple[list[set[int]], str]] = {}
    for tensor, axis, owned, role in entries:
        sets, _ = members.setdefault((tensor, axis), ([set() for _ in units], role))
        for unit, unit_roots in enumerate(units):
            sets[unit].update(position for root in unit_roots for position in owned.get(root, ()))
    if not any(role == "consumer" for _, role in members.values()):
        raise _NotCuttable("its channels are outputs of the network")
    records = tuple(
        Member(tensor, axis, tuple(tuple(sorted(s)) for s in sets), role)
        for (tensor, axis), (sets, role) in members.items()
    )
    return Group(name, len(units), records)


def _classes(items: list[int], ties: Iterable[Sequence[int]]) -> list[list[int]]:
    parent = {item: item for item in items}

    def find(item: int) -> int:
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    for first, *rest in ties:
        for other in rest:
            parent[find(other)] = find(first)
    found: dict[int, list[int]] = {}
    for item in items:
        found.setdefault(find(item), []).append(item)
    return list(found.values())


def _tensors(
    module: Any, out: bool, names: dict[nn.Module, str], dependency: Any
) -> Iterable[tuple[str, int, int, int, str]]:
    """(state-dict name, axis, size, modulus of grouped convolutions or 0, role) that one side of a module owns."""
    if isinstance(module, nn.Parameter):
        axis = dependency.module2node[module].pruning_dim
        return [(dependency._param_to_name[module], axis, module.shape[axis], 0, "norm")]
    if module not in names:
        return []  # an operation without weights
    prefix = f"{names[module]}." if names[module] else ""
    if isinstance(module, (*CONVS, *TRANSPOSED)):
        return _conv_tensors(module, out, prefix)
    if isinstance(module, nn.Linear):
        if not out:
            return [(f"{prefix}weight", 1, module.in_features, 0, "consumer")]
        return _with_bias(module, prefix, "producer")
    if isinstance(module, PER_CHANNEL):
        found = [(name, tensor) for name, tensor in models.tensors(module).items() if tensor.ndim == 1]
        if any(v.shape[0] == 1 for _, v in found) and isinstance(module, nn.PReLU):
            return []  # one slope for all channels
        return [(f"{prefix}{k}", 0, v.shape[0], 0, "norm") for k, v in found]
    if isinstance(module, nn.LayerNorm):
        raise _NotCuttable(
            f"{names[module]} normalizes over all of its channels together, so removing some changes the rest"
        )
    raise _NotCuttable(f"{names[module]} ({type(module).__name__}) is a kind of layer that is not cut yet")


def _conv_tensors(module: Any, out: bool, prefix: str) -> list[tuple[str, int, int, int, str]]:
    out_axis, in_axis = (1, 0) if isinstance(module, TRANSPOSED) else (0, 1)
    if module.groups == 1:
        if out:
            return _with_bias(module, prefix, "producer", out_axis)
        return [(f"{prefix}weight", in_axis, module.in_channels, 0, "consumer")]
    if isinstance(module, TRANSPOSED):
        raise _NotCuttable(f"{prefix[:-1]} is a grouped transposed convolution")
    if module.groups == module.in_channels == module.out_channels:
        return _with_bias(module, prefix, "norm")  # depthwise: one filter per channel, as a scale has
    if out:
        modulus = module.out_channels // module.groups
        return [(t, a, s, modulus, r) for t, a, s, _, r in _with_bias(module, prefix, "producer")]
    per_group = module.in_channels // module.groups
    return [(f"{prefix}weight", 1, per_group, per_group, "consumer")]


def _with_bias(module: Any, prefix: str, role: str, axis: int = 0) -> list[tuple[str, int, int, int, str]]:
    rows = [(f"{prefix}weight", axis, module.weight.shape[axis], 0, role)]
    if module.bias is not None:
        rows.append((f"{prefix}bias", 0, module.bias.shape[0], 0, role))
    return rows


def _out_channels(module: Any) -> int:
    return module.out_features if isinstance(module, nn.Linear) else module.out_channels
