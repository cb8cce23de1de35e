"""The networks of precision.py: two for 224 x 224 images to time, and a MobileNetV2-like for CIFAR-10 to train."""

from __future__ import annotations

import torch
from latency_networks import Inverted, mobilenet, resnet18
from torch import Tensor, nn
from torch.nn import functional

CLASSES = 10
BATCH, RATE, DECAY = 64, 0.1, 5e-4
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Normalized(nn.Module):
    """Pixels in [0, 1] -> logits: the normalization is inside of what is exported."""

    def __init__(self, network: nn.Module) -> None:
        """Wrap a network that eats normalized pixels."""
        nn.Module.__init__(self)
        self.network = network
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, K)."""
        return self.network((x - self.mean) / self.std)


def large(name: str, images: Tensor, seed: int = 0) -> nn.Module:
    """ "resnet18" or "mobilenetv2" for 224 x 224 images, random weights and the batch-norm statistics of `images`."""
    torch.manual_seed(seed)
    network = Normalized(resnet18() if name == "resnet18" else mobilenet())
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            # Channels of uneven width, as trained ones are.
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            module.momentum = None
    network.train()
    with torch.no_grad():
        for batch in images.split(4):
            network(batch)
    return network.eval()


def small_mobilenet() -> nn.Module:
    """MobileNetV2's body at half width for 32 x 32 images: 0.6 million parameters."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6()]
    layers.append(Inverted(16, 8, 1, 1))
    width = 8
    for channels, count, stride in ((16, 2, 2), (16, 2, 1), (32, 3, 2), (48, 2, 1), (80, 2, 2), (160, 1, 1)):
        for number in range(count):
            layers.append(Inverted(width, channels, stride if number == 0 else 1))
            width = channels
    layers += [nn.Conv2d(width, 640, 1, bias=False), nn.BatchNorm2d(640), nn.ReLU6()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(640, CLASSES)]
    return Normalized(nn.Sequential(*layers))


def train(network: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    """Train in place on uint8 (N, 3, 32, 32) with flips and shifts by up to 4 pixels; the rate follows a cosine."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(network.parameters(), RATE, momentum=0.9, weight_decay=DECAY, nesterov=True)
    steps = epochs * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=max(1, steps))
    network.train()
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for chosen in order.split(BATCH)[: len(images) // BATCH]:
            x = functional.pad(images[chosen].float() / 255, (4, 4, 4, 4))
            top, left, flip = (int(torch.randint(n, (1,), generator=generator)) for n in (9, 9, 2))
            x = x[:, :, top : top + 32, left : left + 32]
            loss = functional.cross_entropy(network(x.flip(3) if flip else x), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    network.eval()
