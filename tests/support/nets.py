"""Small networks of every kind that the cut must handle, with random weights and lively statistics."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def conv_bn(i: int, o: int, k: int = 3, **kw: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, k, padding=k // 2, bias=False, **kw), nn.BatchNorm2d(o), nn.ReLU())


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = conv_bn(3, 8), conv_bn(8, 12), nn.Linear(12 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(nn.functional.max_pool2d(self.b(self.a(x)), 2), 1))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = conv_bn(3, 8), conv_bn(8, 16), nn.Conv2d(16, 8, 3, padding=1)
        self.bn, self.down, self.fc = nn.BatchNorm2d(8), conv_bn(8, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(self.down(x) + self.bn(self.two(self.one(x))))
        return self.fc(x.mean((2, 3)))


class Depthwise(nn.Module):
    """Inverted residual with squeeze-and-excitation and hard-swish."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up = conv_bn(3, 8), conv_bn(8, 24, 1)
        self.dw, self.bn = nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False), nn.BatchNorm2d(24)
        self.squeeze, self.excite = nn.Conv2d(24, 6, 1), nn.Conv2d(6, 24, 1)
        self.project, self.fc = nn.Conv2d(24, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = nn.functional.hardswish(self.bn(self.dw(self.up(x))))
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        x = x + self.project(y * gate)
        return self.fc(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv_bn(3, 16), conv_bn(16, 24, groups=4)
        self.c, self.fc = conv_bn(24, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.c(self.b(self.a(x))).mean((2, 3)))


class Concat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv_bn(3, 6), conv_bn(6, 10), conv_bn(16, 8)
        self.fc = nn.Linear(8 + 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        ab = torch.cat([a, self.b(a)], 1)
        return self.fc(torch.cat([self.c(ab), ab], 1).mean((2, 3)))


class Split(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.left, self.right = conv_bn(3, 12), conv_bn(6, 8), conv_bn(6, 8)
        self.c, self.fc = conv_bn(16, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        left, right = torch.chunk(self.a(x), 2, 1)
        return self.fc(self.c(torch.cat([self.left(left), self.right(right)], 1)).mean((2, 3)))


class GroupNormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.Conv2d(16, 8, 3)
        self.p, self.fc = nn.PReLU(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.p(self.b(torch.relu(self.n(self.a(x))))).mean((2, 3)))


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.up, self.fc = conv_bn(3, 8), nn.ConvTranspose2d(8, 6, 2, stride=2), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.up(self.a(x))).mean((2, 3)))


NETS = {
    n.__name__.lower(): n
    for n in (Plain, Residual, Depthwise, Grouped, Concat, Split, GroupNormed, Transposed)
}
SHAPE = (3, 8, 8)


def build(name: str, seed: int = 0) -> nn.Module:
    """One of NETS with random weights and batch-norm statistics that are not 0 and 1."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = NETS[name]()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
                nn.init.normal_(module.running_mean, std=0.3)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network.eval()


def example(batch: int = 1, seed: int = 1) -> Tensor:
    return torch.rand((batch, *SHAPE), generator=torch.Generator().manual_seed(seed))
