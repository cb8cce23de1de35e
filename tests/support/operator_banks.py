"""Networks of operators side by side, one answer entry for each entry that an operator gives."""

from __future__ import annotations

from collections.abc import Callable

import nets
import torch
from paths import RESNET20
from programs import lively
from torch import Tensor, nn
from torch.nn import functional

from edgeprune.models import architectures

# An operator alone takes what the bank's convolution gives it: (1, 4, 6, 6), values on both sides of 0.
Op = Callable[[Tensor], Tensor]
F = functional


ACTIVATIONS: dict[str, Op] = {
    "relu": F.relu,
    "relu6": lambda x: F.relu6(4 * x),
    "hardtanh": F.hardtanh,
    "clamp": lambda x: x.clamp(-0.3, 0.4),
    "clamp_min": lambda x: x.clamp(min=-0.3),
    "clamp_max": lambda x: x.clamp(max=0.3),
    "leaky_relu": F.leaky_relu,
    "leaky_relu that falls": lambda x: F.leaky_relu(x, -0.5),
    "sigmoid": torch.sigmoid,
    "hardsigmoid": lambda x: F.hardsigmoid(3 * x),
    "tanh": torch.tanh,
    "silu": F.silu,
    "hardswish": lambda x: F.hardswish(3 * x),
    "gelu": F.gelu,
}
POOLS: dict[str, Op] = {
    "max_pool2d": lambda x: F.max_pool2d(x, 3, 2, 1),
    "max_pool2d ceil": lambda x: F.max_pool2d(x, 4, 3, ceil_mode=True),
    "max_pool2d with places": lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
    "max_pool1d": lambda x: F.max_pool1d(x.flatten(2), 3),
    "avg_pool2d": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "avg_pool2d without padding": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "avg_pool2d by 3": lambda x: F.avg_pool2d(x, 2, divisor_override=3),
    "avg_pool1d": lambda x: F.avg_pool1d(x.flatten(2), 3),
    "adaptive_avg_pool2d to 1": lambda x: F.adaptive_avg_pool2d(x, 1),
    "adaptive_avg_pool2d to 4": lambda x: F.adaptive_avg_pool2d(x, 4),
    "mean over positions": lambda x: x.mean((2, 3)),
    "mean over channels": lambda x: x.mean(1, keepdim=True),
    "mean over all": lambda x: x.mean().reshape(1, 1),
    "sum over positions": lambda x: x.sum((2, 3)),
    "sum over channels": lambda x: x.sum(1),
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "bilinear": lambda x: F.interpolate(x, size=(9, 8), mode="bilinear"),
    "bilinear to the corners": lambda x: F.interpolate(
        x, scale_factor=2, mode="bilinear", align_corners=True
    ),
}
ARITHMETIC: dict[str, Op] = {
    "add": lambda x: x + torch.relu(x),
    "add with alpha": lambda x: torch.add(x, torch.relu(x), alpha=-2),
    "add a number": lambda x: x + 1.5,
    "sub": lambda x: x - torch.tanh(x),
    "mul": lambda x: x * torch.relu(x),
    "mul by a number": lambda x: -2 * x,
    "mul by itself": lambda x: x * x,
    "div by a number": lambda x: x / 3,
    "gate per channel": lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)),
}
MOVES: dict[str, Op] = {
    "cat": lambda x: torch.cat([x, torch.relu(x)], 1),
    "cat of positions": lambda x: torch.cat([x, torch.relu(x)], 2),
    "cat with a constant": lambda x: torch.cat([x, torch.ones(1, 2, 6, 6)], 1),
    "chunk": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "split": lambda x: x.split([1, 3], 1)[1],
    "uneven split": lambda x: x.split(3, 1)[1],
    "slice": lambda x: x[:, 1:3, ::2, 1:],
    "narrow": lambda x: x.narrow(1, 1, 2),
    "view": lambda x: x.view(1, 2, -1),
    "shuffle": lambda x: x.view(1, 2, 2, 6, 6).transpose(1, 2).reshape(1, 4, 6, 6),
    "permute": lambda x: x.permute(0, 2, 3, 1).reshape(1, 36, 4)[:, ::2],
    "transpose": lambda x: x.transpose(1, 3).contiguous(),
    "squeeze and unsqueeze": lambda x: x.unsqueeze(1).squeeze(1).unsqueeze(-1),
    "clone and dropout": lambda x: F.dropout(x.clone().float(), 0.5, training=False),
    "pad": lambda x: F.pad(x, (1, 0, 2, 1)),
    "pad with 3": lambda x: F.pad(x, (1, 0, 2, 1), value=3.0),
    "pad channels": lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)),
    "crop": lambda x: F.pad(x, (-1, 1, 0, -2)),
    "zeros_like": lambda x: x + torch.zeros_like(x) + x.new_ones(1),
    "in place": lambda x: x.clone().mul_(2).add_(1),
}


class Bank(nn.Module):
    """Operators side by side behind one convolution; the answer is all that they give, entry by entry."""

    def __init__(self, ops: dict[str, Op]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.ops = ops

    def forward(self, x: Tensor) -> Tensor:
        x = 2 * self.conv(x)
        return torch.cat([op(x).flatten(1) for op in self.ops.values()], 1)


class Layers(nn.Module):
    """Layers with weights side by side behind one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.plain = nn.ModuleList(
            [
                nn.Conv2d(4, 6, 1),
                nn.Conv2d(4, 6, 3, 2, 1),
                nn.Conv2d(4, 6, 3, dilation=2, padding=2),
                nn.Conv2d(4, 6, 3, groups=2),
                nn.Conv2d(4, 8, 3, padding=1, groups=4),
                nn.Conv2d(4, 6, 4, padding="same"),
                nn.BatchNorm2d(4),
                nn.BatchNorm2d(4, affine=False),
                nn.Linear(6, 5),
            ]
        )
        self.along, self.solid = nn.Conv1d(4, 5, 3, padding=1), nn.Conv3d(1, 2, 3, padding=1)
        self.flat = nn.Linear(4 * 36, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = 2 * self.conv(x)
        found = [layer(x) for layer in self.plain]
        found += [self.along(x.flatten(2)), self.solid(x.unsqueeze(1)), self.flat(x.flatten(1))]
        return torch.cat([y.flatten(1) for y in found], 1)


def built(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """A network with repeatable weights, and the shape of its input."""
    banks = {"activations": ACTIVATIONS, "pools": POOLS, "arithmetic": ARITHMETIC, "moves": MOVES}
    if name in nets.NETS:
        return nets.build(name), nets.SHAPE
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "resnet20":
            return lively(architectures.architecture(RESNET20)), (3, 32, 32)
        return lively(Layers() if name == "layers" else Bank(banks[name])), (3, 6, 6)
