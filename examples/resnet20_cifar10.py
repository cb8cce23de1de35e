"""ResNet-20 for 32x32 images (He et al. 2016, section 4.2): three stages of three residual blocks.

Where a stage halves the image and doubles the channels, the shortcut has no weights: it takes every second
pixel and pads the channels with zeros on both sides (option A of the paper). For weights trained elsewhere:

    edgeprune compress resnet20.pt --arch examples/resnet20_cifar10.py:resnet20 --input 3x32x32 --target local
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTHS = (16, 32, 64)
BLOCKS_PER_STAGE = 3


class Block(nn.Module):
    """Two 3x3 convolutions with batch-norm, added to the shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        """A block from `inputs` to `outputs` channels; stride 2 halves the image."""
        nn.Module.__init__(self)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.added = (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        out = functional.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.stride > 1:
            x = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.added, self.added))
        return functional.relu(out + x)


class ResNet20(nn.Module):
    """Normalized images (N, 3, 32, 32) to logits (N, classes)."""

    def __init__(self, classes: int) -> None:
        """Random weights: He initialization of every convolution and of the classifier."""
        nn.Module.__init__(self)
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.layer1 = _stage(WIDTHS[0], WIDTHS[0], stride=1)
        self.layer2 = _stage(WIDTHS[0], WIDTHS[1], stride=2)
        self.layer3 = _stage(WIDTHS[1], WIDTHS[2], stride=2)
        self.linear = nn.Linear(WIDTHS[2], classes)
        for layer in self.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 32, 32) to (N, classes)."""
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = functional.adaptive_avg_pool2d(x, 1)
        return self.linear(torch.flatten(x, 1))


def resnet20(classes: int = 10) -> nn.Module:
    """The network with random weights; 269,722 parameters for 10 classes."""
    return ResNet20(classes)


def _stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    blocks = [Block(inputs, outputs, stride)]
    blocks += [Block(outputs, outputs, 1) for _ in range(BLOCKS_PER_STAGE - 1)]
    return nn.Sequential(*blocks)
