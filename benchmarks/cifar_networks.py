"""Networks for 32 x 32 images: one that two cores can train, and the two of the papers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

CLASSES = 10
VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)


def small() -> nn.Module:
    """Four convolutions of 16 to 64 channels with batch-norm, 61,338 parameters, 2.1 million multiply-accumulates."""
    layers = [*_conv(3, 16, 2), *_conv(16, 32, 2), *_conv(32, 64, 1), *_conv(64, 64, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES))


def vgg16() -> nn.Module:
    """VGG-16 with batch-norm and one linear layer: 14.7 million parameters."""
    layers: list[nn.Module] = []
    width = 3
    for channels in VGG16:
        layers += _conv(width, channels, 1) if channels else [nn.MaxPool2d(2)]
        width = channels or width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES))


def resnet18() -> nn.Module:
    """ResNet-18 with a 3 x 3 stem: 11.2 million parameters."""
    layers: list[nn.Module] = [*_conv(3, 64, 1)]
    width = 64
    for channels, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [_Block(width, channels, stride), _Block(channels, channels, 1)]
        width = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES))


NETWORKS: dict[str, Callable[[], nn.Module]] = {"small": small, "resnet18": resnet18, "vgg16": vgg16}


class _Block(nn.Module):
    def __init__(self, before: int, channels: int, stride: int) -> None:
        nn.Module.__init__(self)
        self.one = nn.Sequential(*_conv(before, channels, stride))
        self.two = nn.Sequential(*_conv(channels, channels, 1)[:2])
        same = before == channels and stride == 1
        self.short = nn.Identity() if same else nn.Sequential(*_conv(before, channels, stride, 1)[:2])

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.two(self.one(x)) + self.short(x))


def _conv(before: int, channels: int, stride: int, kernel: int = 3) -> list[nn.Module]:
    conv = nn.Conv2d(before, channels, kernel, stride, kernel // 2, bias=False)
    return [conv, nn.BatchNorm2d(channels), nn.ReLU()]
