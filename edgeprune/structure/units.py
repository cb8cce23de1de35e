"""Prunable units: what is kept or removed as a whole, at one granularity.

A unit is a coupled channel of a group ("channel"), one weight ("weight"), or one weight of a block of four of which
two stay ("2:4"). A mask is {name: bool (n,)}, True stays: a name is a group's, or a parameter's whose entries are
numbered in row-major order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch

import torch
from torch import Tensor, nn

from edgeprune.errors import UnsupportedModel
from edgeprune.records import Group, Masks

ROLES = ("producer", "norm", "consumer")
BLOCK = 4
KEPT_OF_BLOCK = 2
_PRUNED_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


@dataclass(frozen=True)
class Units:
    """All units of a network.

    sizes: name -> n. groups: name -> group, of channels. shapes: parameter -> shape, of weights. blocks: parameter ->
    int64 (m, 4), the entries of each block along the input channels, for 2:4. left_out: layer -> why it stays dense.
    """

    granularity: str
    sizes: Mapping[str, int]
    groups: Mapping[str, Group] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    blocks: Mapping[str, Tensor] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)

    def all(self) -> dict[str, Tensor]:
        """The mask that keeps everything."""
        return {name: torch.ones(n, dtype=torch.bool) for name, n in self.sizes.items()}

    def norms(self, network: nn.Module) -> dict[str, Tensor]:
        """|w|, or the root mean square of all that a channel owns: float64 (n,)."""
        named = _parameters(network)
        if self.granularity != "channel":
            return {name: named[name].detach().double().abs().flatten().cpu() for name in self.sizes}
        squares = {name: p.detach().double() ** 2 for name, p in named.items()}
        ones = {name: torch.ones_like(value) for name, value in squares.items()}
        owned = self.sums(ones)
        return {g: (s / torch.clamp(owned[g], min=1)).sqrt() for g, s in self.sums(squares).items()}

    def sums(self, values: Mapping[str, Tensor], roles: Sequence[str] = ROLES) -> dict[str, Tensor]:
        """A value per entry, summed over the entries that each unit owns.

        Args:
            values: parameter -> a number per entry; missing ones count as 0.
        """
        if self.granularity == "channel":
            return {name: channel_sums(group, values, roles).cpu() for name, group in self.groups.items()}
        zeros = {name: torch.zeros(n, dtype=torch.float64) for name, n in self.sizes.items()}
        return {
            name: values[name].detach().double().flatten().cpu() if name in values else zeros[name]
            for name in self.sizes
        }

    def entries(
        self, masks: Mapping[str, Tensor], network: nn.Module, roles: Sequence[str] = ROLES
    ) -> dict[str, Tensor]:
        """Which entries stay: parameter -> bool like it; only parameters of which something goes."""
        named = _parameters(network)
        if self.granularity != "channel":
            return {
                name: keep.view(self.shapes[name]).to(named[name].device)
                for name, keep in masks.items()
                if not bool(keep.all())
            }
        gone: dict[str, dict[int, list[int]]] = {}
        for name, keep in masks.items():
            removed = (~keep).nonzero().flatten().tolist()
            for member in self.groups[name].members if removed else ():
                if member.role in roles and member.tensor in named:
                    axis = gone.setdefault(member.tensor, {}).setdefault(member.axis, [])
                    axis.extend(position for unit in removed for position in member.positions[unit])
        out = {}
        for tensor, axes in gone.items():
            stays = torch.ones_like(named[tensor], dtype=torch.bool)
            for axis, positions in axes.items():
                stays.index_fill_(axis, torch.tensor(positions, device=stays.device), False)
            out[tensor] = stays
        return out

    def apply(self, network: nn.Module, masks: Mapping[str, Tensor], roles: Sequence[str] = ROLES) -> None:
        """Zero what is pruned, in place; batch-norm statistics stay, because a zero scale hides them."""
        named = _parameters(network)
        with torch.no_grad():
            for name, stays in self.entries(masks, network, roles).items():
                named[name].masked_fill_(~stays, 0)

    def masks(self, units: Mapping[str, Tensor]) -> Masks:
        """The choice as a `Masks` record."""
        if self.granularity == "channel":
            return Masks(channels=dict(units))
        return Masks(weights={name: keep.view(self.shapes[name]) for name, keep in units.items()})

    def best_of_blocks(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of each block of four the two largest scores; of equal ones the first. Other entries stay."""
        out = {}
        for name, n in self.sizes.items():
            blocks = self.blocks[name]
            order = torch.argsort(scores[name][blocks], dim=1, descending=True, stable=True)
            keep = torch.ones(n, dtype=torch.bool)
            keep[blocks.gather(1, order[:, KEPT_OF_BLOCK:]).flatten()] = False
            out[name] = keep
        return out


def of_channels(groups: Sequence[Group]) -> Units:
    """Coupled channels as units."""
    return Units("channel", {g.name: g.channels for g in groups}, groups={g.name: g for g in groups})


def of_weights(network: nn.Module, granularity: str, skip: Sequence[str] = ()) -> Units:
    """The weights of convolutions and linear layers as units.

    For 2:4 the blocks lie along the input channels, for each output and each position of the kernel, as TensorRT's
    sparse kernels require; layers whose input channels (of one group) are not a multiple of four stay dense.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    blocks: dict[str, Tensor] = {}
    left_out: dict[str, str] = {}
    seen: set[int] = set()
    for path, layer in network.named_modules():
        weight = getattr(layer, "weight", None)
        if (
            not isinstance(layer, _PRUNED_LAYERS)
            or not isinstance(weight, nn.Parameter)
            or id(weight) in seen
        ):
            continue
        seen.add(id(weight))
        if any(fnmatch(path, pattern) for pattern in skip):
            left_out[path] = "asked for with prune.skip"
        elif granularity == "2:4" and weight.shape[1] % BLOCK:
            left_out[path] = f"{weight.shape[1]} input channels of a group are not a multiple of {BLOCK}"
        else:
            name = f"{path}.weight" if path else "weight"
            shapes[name] = tuple(weight.shape)
            if granularity == "2:4":
                blocks[name] = _blocks(shapes[name])
    if not shapes:
        why = "; ".join(f"{layer}: {reason}" for layer, reason in list(left_out.items())[:3])
        raise UnsupportedModel(
            f"no layer's weights can be pruned at granularity {granularity}" + (f" ({why})" if why else ""),
            "only convolutions and linear layers are",
        )
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    return Units(granularity, sizes, shapes=shapes, blocks=blocks, left_out=left_out)


def exactly(scores: Mapping[str, Tensor], k: int, floors: Mapping[str, int]) -> dict[str, Tensor]:
    """The k largest scores of all names together, but at least the floor of each; equal ones by name, then place.

    Args:
        k: from the sum of the floors to the number of scores.
    """
    out = {name: torch.zeros(len(s), dtype=torch.bool) for name, s in scores.items()}
    for name, s in scores.items():
        out[name][torch.argsort(s, descending=True, stable=True)[: floors.get(name, 0)]] = True
    left = k - sum(int(keep.sum()) for keep in out.values())
    assert left >= 0, "the floors were checked to fit"
    names = list(scores)
    flat = torch.cat([scores[name].double().masked_fill(out[name], -torch.inf) for name in names])
    chosen = torch.zeros(len(flat), dtype=torch.bool)
    chosen[torch.argsort(flat, descending=True, stable=True)[:left]] = True
    for name, part in zip(names, chosen.split([len(scores[n]) for n in names]), strict=True):
        out[name] |= part
    return out


def drop_smallest(scores: Tensor, mask: Tensor, count: int) -> Tensor:
    """A mask with `count` more units gone: those that stay with the smallest scores, the first of equal ones."""
    alive = mask.nonzero().flatten()
    after = mask.clone()
    after[alive[torch.argsort(scores[alive], stable=True)[:count]]] = False
    return after


def channel_sums(group: Group, values: Mapping[str, Tensor], roles: Sequence[str]) -> Tensor:
    """A value per parameter entry, summed over the entries that each channel owns; missing tensors count as 0."""
    total = torch.zeros(group.channels, dtype=torch.float64)
    for member in group.members:
        if member.role not in roles or member.tensor not in values:
            continue
        value = values[member.tensor]
        flat = value.movedim(member.axis, 0).reshape(value.shape[member.axis], -1).double().sum(1).cpu()
        lengths = {len(p) for p in member.positions}
        if lengths == {1}:
            total += flat[torch.tensor([p[0] for p in member.positions])]
            continue
        owner = torch.tensor([unit for unit, p in enumerate(member.positions) for _ in p], dtype=torch.long)
        where = torch.tensor([q for p in member.positions for q in p], dtype=torch.long)
        total.index_add_(0, owner, flat[where])
    return total


def _parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    return dict(network.named_parameters(remove_duplicate=False))


def _blocks(shape: tuple[int, ...]) -> Tensor:
    """Flat indices (m, 4) of four neighbours along axis 1."""
    numbers = torch.arange(torch.Size(shape).numel()).view(shape)
    return numbers.movedim(1, -1).reshape(-1, BLOCK)
