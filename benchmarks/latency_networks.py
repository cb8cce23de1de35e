"""Five networks whose layers cost time in different ways, with random weights and lively batch-norms: plain torch."""

from __future__ import annotations

from collections.abc import Callable

import _paths  # noqa: F401
import torch
from resnet20_cifar10 import ResNet20
from torch import Tensor, nn

CLASSES = 100


class Residual(nn.Module):
    """Two 3 x 3 convolutions added to the input, as in ResNet-18."""

    def __init__(self, before: int, channels: int, stride: int) -> None:
        """A block from `before` to `channels`."""
        nn.Module.__init__(self)
        self.one = nn.Sequential(*_conv(before, channels, stride))
        self.two = nn.Sequential(*_conv(channels, channels, 1)[:2])
        same = before == channels and stride == 1
        self.short = nn.Identity() if same else nn.Sequential(*_conv(before, channels, stride, 1)[:2])

    def forward(self, x: Tensor) -> Tensor:
        """(N, before, H, W) to (N, channels, H / stride, W / stride)."""
        return torch.relu(self.two(self.one(x)) + self.short(x))


class Inverted(nn.Module):
    """Widen, filter each channel, narrow: the block of MobileNetV2."""

    def __init__(self, before: int, channels: int, stride: int, wider: int = 6) -> None:
        """A block from `before` to `channels`."""
        nn.Module.__init__(self)
        inside = before * wider
        depthwise = nn.Conv2d(inside, inside, 3, stride, 1, groups=inside, bias=False)
        up = [] if wider == 1 else _conv(before, inside, 1, 1, relu6=True)
        self.body = nn.Sequential(
            *up, depthwise, nn.BatchNorm2d(inside), nn.ReLU6(), *_conv(inside, channels, 1, 1)[:2]
        )
        self.adds = stride == 1 and before == channels

    def forward(self, x: Tensor) -> Tensor:
        """(N, before, H, W) to (N, channels, H / stride, W / stride)."""
        return x + self.body(x) if self.adds else self.body(x)


class Dense(nn.Module):
    """Batch-norm before each convolution, and every layer reads all before it: a block of DenseNet-BC."""

    def __init__(self, before: int, growth: int) -> None:
        """One layer that adds `growth` channels."""
        nn.Module.__init__(self)
        self.body = nn.Sequential(
            nn.BatchNorm2d(before), nn.ReLU(), *_conv(before, 4 * growth, 1, 1),
            nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """(N, before, H, W) to (N, before + growth, H, W)."""
        return torch.cat([x, self.body(x)], 1)


def resnet20() -> nn.Module:
    """ResNet-20 for 32 x 32 images: 41 million multiply-accumulates."""
    return ResNet20(10)


def resnet18() -> nn.Module:
    """ResNet-18 for 224 x 224 images: 1.8 billion multiply-accumulates."""
    layers: list[nn.Module] = [*_conv(3, 64, 2, 7), nn.MaxPool2d(3, 2, 1)]
    width = 64
    for channels, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [Residual(width, channels, stride), Residual(channels, channels, 1)]
        width = channels
    return nn.Sequential(*layers, *_head(width))


def mobilenet() -> nn.Module:
    """MobileNetV2's body for 160 x 160 images: 150 million multiply-accumulates."""
    layers: list[nn.Module] = [*_conv(3, 32, 2, relu6=True), Inverted(32, 16, 1, 1)]
    width = 16
    for channels, count, stride in ((24, 2, 2), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1)):
        for number in range(count):
            layers.append(Inverted(width, channels, stride if number == 0 else 1))
            width = channels
    return nn.Sequential(*layers, *_conv(width, 1280, 1, 1, relu6=True), *_head(1280))


def vgg() -> nn.Module:
    """VGG-16's thirteen convolutions for 32 x 32 images: 313 million multiply-accumulates."""
    layers: list[nn.Module] = []
    width = 3
    for channels in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512):
        layers += _conv(width, channels, 1) if channels else [nn.MaxPool2d(2)]
        width = channels or width
    return nn.Sequential(*layers, *_head(width))


def densenet() -> nn.Module:
    """Three blocks of eight layers that each add 24 channels, for 64 x 64 images."""
    layers: list[nn.Module] = [*_conv(3, 48, 2)]
    width = 48
    for block in range(3):
        for _ in range(8):
            layers.append(Dense(width, 24))
            width += 24
        if block < 2:
            layers += [
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Conv2d(width, width // 2, 1, bias=False),
                nn.AvgPool2d(2),
            ]
            width //= 2
    return nn.Sequential(*layers, nn.BatchNorm2d(width), nn.ReLU(), *_head(width))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "ResNet-20, 32 x 32": (resnet20, (3, 32, 32)),
    "ResNet-18, 224 x 224": (resnet18, (3, 224, 224)),
    "MobileNetV2-like, 160 x 160": (mobilenet, (3, 160, 160)),
    "VGG-like, 32 x 32": (vgg, (3, 32, 32)),
    "DenseNet-like, 64 x 64": (densenet, (3, 64, 64)),
}


def build(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A network with random weights in eval mode, and one random image (1, C, H, W) in [0, 1]."""
    make, shape = NETWORKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = make()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.1)
        return network.eval(), torch.rand((1, *shape))


def _conv(
    before: int, channels: int, stride: int, kernel: int = 3, *, relu6: bool = False
) -> list[nn.Module]:
    conv = nn.Conv2d(before, channels, kernel, stride, kernel // 2, bias=False)
    return [conv, nn.BatchNorm2d(channels), nn.ReLU6() if relu6 else nn.ReLU()]


def _head(width: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES)]
