"""What bfloat16 does to the time of a training step on this CPU: plain, grouped and depthwise convolutions.

    python benchmarks/mixed.py

Prints the processor time of a step (forward and backward, 64 images of 32 x 32, channels last, one thread) in bfloat16
autocast as a share of float32's: medians of steps that are timed in turn.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import nn
from torch.nn import functional

ROUNDS, IMAGES = 30, 64


def main() -> None:
    """Time each network and print a line for it."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("| network | bfloat16 / float32 |\n|---|---|")
    for width in (8, 16, 32, 64):
        print(f"| convolutions, {width} channels | {ratio(plain(width, 1)):.2f} |")
    print(f"| convolutions, 64 channels in 8 groups | {ratio(plain(64, 8)):.2f} |")
    print(f"| depthwise convolutions, 64 channels | {ratio(plain(64, 64)):.2f} |")
    print(f"| inverted bottlenecks as in MobileNetV2, 16 channels | {ratio(bottlenecks(16)):.2f} |")


def plain(width: int, groups: int) -> nn.Module:
    """Four convolutions with batch-norm behind a stem."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1)]
    for _ in range(4):
        layers += [nn.Conv2d(width, width, 3, padding=1, groups=groups), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def bottlenecks(width: int) -> nn.Module:
    """Three blocks: four times as wide, depthwise, narrow again."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1)]
    wide = 4 * width
    for _ in range(3):
        layers += [nn.Conv2d(width, wide, 1), nn.BatchNorm2d(wide), nn.ReLU6()]
        layers += [nn.Conv2d(wide, wide, 3, padding=1, groups=wide), nn.BatchNorm2d(wide), nn.ReLU6()]
        layers += [nn.Conv2d(wide, width, 1), nn.BatchNorm2d(width)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def ratio(module: nn.Module) -> float:
    """Median time in bfloat16 over that in float32."""
    module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.rand(IMAGES, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    y = torch.arange(IMAGES) % 10
    times: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(ROUNDS):
        for mixed, kept in times.items():
            start = time.thread_time()
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                loss = functional.cross_entropy(module(x).float(), y)
            loss.backward()
            kept.append(time.thread_time() - start)
    return statistics.median(times[True][3:]) / statistics.median(times[False][3:])


if __name__ == "__main__":
    main()
