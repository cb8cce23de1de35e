"""What a network costs, counted: parameters and multiply-accumulates, per layer and as a function of kept channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from edgeprune.nn.surgery import logits
from edgeprune.records import Group, InputSpec

LAYERS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear,
)  # fmt: skip


@dataclass(frozen=True)
class LayerCost:
    """One layer: its parameters (zeros included) and its multiply-accumulates for one image."""

    name: str
    op: str
    channels: int
    params: int
    macs: int
    kernel: tuple[int, ...]


@dataclass(frozen=True)
class CostModel:
    """Costs as a function of how many channels each group keeps; exact where all channels of a group are alike.

    sizes: tensor -> shape. positions: weight -> multiply-accumulates per entry. shares: tensor -> axis ->
    ((group, entries per channel), ...). channels: group -> C. constant_macs: what no layer's weight explains
    (attention products). constant_params: parameters that no cut touches.
    """

    sizes: Mapping[str, tuple[int, ...]]
    positions: Mapping[str, float]
    shares: Mapping[str, Mapping[int, tuple[tuple[str, float], ...]]]
    channels: Mapping[str, int]
    constant_macs: float
    constant_params: int
    parameters: frozenset[str]

    def cost(self, kept: Mapping[str, int]) -> dict[str, float]:
        """Parameters and multiply-accumulates (one image) when each group keeps so many channels."""
        macs, params = self.constant_macs, float(self.constant_params)
        for name, shape in self.sizes.items():
            entries = 1.0
            for axis, size in enumerate(shape):
                gone = sum(
                    (self.channels[g] - kept.get(g, self.channels[g])) * per
                    for g, per in self.shares[name].get(axis, ())
                )
                entries *= size - gone
            macs += self.positions.get(name, 0.0) * entries
            params += entries if name in self.parameters else 0.0
        return {"macs": macs, "params": params}


def normalized_example(spec: InputSpec, seed: int, batch: int = 1) -> Tensor:
    """Random pixels as the bare network eats them: float32 (batch, C, H, W), normalized by the spec's mean and std."""
    generator = torch.Generator().manual_seed(seed)
    x = spec.low + (spec.high - spec.low) * torch.rand((batch, *spec.shape), generator=generator)
    if spec.mean:
        x = (x - torch.tensor(spec.mean).view(-1, 1, 1)) / torch.tensor(spec.std).view(-1, 1, 1)
    return x


def layer_costs(network: nn.Module, example: Tensor) -> tuple[LayerCost, ...]:
    """One row for every convolution and linear layer that the input reaches, in the order of definition.

    Args:
        example: float32 (N, C, H, W); the counts are for one image.
    """
    outputs: dict[nn.Module, int] = {}

    def remember(module: nn.Module, _inputs: object, output: Tensor) -> None:
        outputs[module] = outputs.get(module, 0) + output.numel() // example.shape[0]

    handles = [m.register_forward_hook(remember) for m in network.modules() if isinstance(m, LAYERS)]
    try:
        logits(network, example)
    finally:
        for handle in handles:
            handle.remove()
    return tuple(_row(name, m, outputs[m]) for name, m in network.named_modules() if m in outputs)


def total_macs(network: nn.Module, example: Tensor) -> int:
    """Multiply-accumulates of one image, products without weights (attention) included."""
    with FlopCounterMode(display=False) as counter:
        logits(network, example)
    return counter.get_total_flops() // 2 // example.shape[0]


def total_params(network: nn.Module) -> int:
    """Non-zero parameters; a parameter that two layers share counts once."""
    return sum(int(torch.count_nonzero(p)) for p in network.parameters())


def cost_model(network: nn.Module, groups: Sequence[Group], example: Tensor) -> CostModel:
    """The costs of a network as a function of the channels that each group keeps."""
    rows = layer_costs(network, example)
    positions = {f"{r.name}.weight": r.macs / network.get_parameter(f"{r.name}.weight").numel() for r in rows}
    shares: dict[str, dict[int, list[tuple[str, float]]]] = {}
    for group in groups:
        for member in group.members:
            per = sum(len(p) for p in member.positions) / group.channels
            shares.setdefault(member.tensor, {}).setdefault(member.axis, []).append((group.name, per))
    named = dict(network.named_parameters())
    everything = dict(network.named_parameters(remove_duplicate=False))
    sizes = {n: tuple(everything[n].shape) for n in {*shares, *positions} if n in everything}
    touched = sum(named[n].numel() for n in sizes if n in named)
    explained = sum(r.macs for r in rows)
    return CostModel(
        sizes=sizes,
        positions=positions,
        shares={n: {a: tuple(v) for a, v in shares.get(n, {}).items()} for n in sizes},
        channels={g.name: g.channels for g in groups},
        constant_macs=float(max(0, total_macs(network, example) - explained)),
        constant_params=sum(p.numel() for p in named.values()) - touched,
        parameters=frozenset(n for n in sizes if n in named),
    )


def _row(name: str, module: Any, outputs: int) -> LayerCost:
    weight: Tensor = module.weight
    params = sum(p.numel() for p in module.parameters(recurse=False))
    op = type(module).__name__
    if isinstance(module, nn.Linear):
        return LayerCost(name, op, module.out_features, params, outputs * module.in_features, ())
    per_output, diluted = weight[0].numel(), 1
    if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        # Each output entry sums in_channels/groups * kernel products, divided by the stride's dilution.
        per_output = module.in_channels // module.groups * weight[0, 0].numel()
        diluted = prod(module.stride)
    macs = outputs * per_output // diluted
    return LayerCost(name, op, module.out_channels, params, macs, tuple(module.kernel_size))
