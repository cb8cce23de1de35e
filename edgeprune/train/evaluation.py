"""Accuracy, accuracy under the attack of an objective, and mean loss of a network."""

import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeprune.confidence import binomial
from edgeprune.data import Split
from edgeprune.models import logits, modes
from edgeprune.progress import bar
from edgeprune.records import Reading
from edgeprune.train.job import seeded_generator
from edgeprune.train.objectives import Objective
from edgeprune.train.placement import ExecutionConfig, device_of, fastest_config, restored_device

BATCH_UNDER_ATTACK = 250


def accuracy(module: nn.Module, split: Split, batch: int = 500) -> tuple[int, int]:
    """Images of a split that are classified right, and all of them; an output that is not finite is wrong."""
    return int(right(module, split, torch.arange(len(split)), batch=batch).sum()), len(split)


def right(
    module: nn.Module,
    split: Split,
    rows: Tensor,
    change: Callable[[Tensor], Tensor] | None = None,
    batch: int = 500,
) -> Tensor:
    """Which of the images `rows` (n,) are classified right, bool (n,), each batch changed first by `change`."""
    found, label = [], f"accuracy on {split.name}"
    with _ready(module, split) as device, torch.no_grad(), bar(len(rows), label) as advance:
        for x, y in split.batches(batch, rows):
            images = x if change is None else change(x)
            found.append(_right(module, images.to(device), y.to(device)).cpu())
            advance(len(y))
    return torch.cat(found)


def robust_accuracy(
    module: nn.Module, split: Split, objective: Objective, *, seed: int, limit: int = 0
) -> tuple[int, int]:
    """Images that are classified right under the objective's own attack, and all that were tried."""
    with _ready(module, split) as device:
        placement = ExecutionConfig(device, torch.contiguous_format)
        return attacked(module, split, some(len(split), limit, seed), (objective, seed), placement)


def some(count: int, limit: int, seed: int) -> Tensor:
    """Rows of `count` images that are tried: all, or a random `limit` of them; int64, ascending."""
    if not 0 < limit < count:
        return torch.arange(count)
    return torch.randperm(count, generator=seeded_generator(seed, "some"))[:limit].sort().values


def attacked(
    module: nn.Module, split: Split, rows: Tensor, attack: tuple[Objective, int], placement: ExecutionConfig
) -> tuple[int, int]:
    """Images among `rows` (n,) that are classified right under an objective's attack with a seed, and n.

    The network is on the placement's device; the modes of its layers are restored.
    """
    objective, seed = attack
    correct = 0
    label = f"{'attacked' if objective.attacks else 'accuracy'} on {split.name}"
    with modes(None, module), placement.autocast(), bar(len(rows), label) as advance:
        for number, (x, y) in enumerate(split.batches(BATCH_UNDER_ATTACK, rows)):
            images, labels = placement.images(x), y.to(placement.device)
            found = objective.attack(module, images, labels, seeded_generator(seed, number, "attack"))
            with torch.no_grad():
                correct += int(_right(module, found, labels).sum())
            advance(len(y))
    return correct, len(rows)


def mean_loss(module: nn.Module, images: Tensor, labels: Tensor, batch: int = 256) -> float:
    """Mean cross-entropy over images (n, C, H, W) with labels (n,), in evaluation mode; may be NaN."""
    total = 0.0
    device = device_of(module)
    with modes(None, module), torch.no_grad():
        for x, y in zip(images.split(batch), labels.split(batch), strict=True):
            output = logits(module, x.to(device))
            total += float(functional.cross_entropy(output, y.to(device), reduction="sum"))
    return total / len(images)


@contextmanager
def _ready(module: nn.Module, split: Split) -> Iterator[torch.device]:
    """The network in evaluation mode on the fastest device that runs it; mode and device are restored."""
    with restored_device([module]), modes(None, module):
        yield fastest_config([module], split.take(torch.arange(min(2, len(split))))).device


def _right(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    output = logits(module, x)
    return (output.argmax(1) == y) & output.isfinite().all(1)


def reading(network: nn.Module, split: Split, stage: str, used: Mapping[str, Any]) -> Reading:
    """The accuracy on held-out images after a `stage` with its exact binomial 95 % interval; used: by the stage."""
    correct, total = accuracy(network, split)
    return Reading(
        metric="clean_accuracy",
        value=correct / total,
        unit="fraction",
        n=total,
        spread=binomial(correct, total),
        where=f"local {platform.machine()} torch",
        artifact="compressed",
        conditions={"stage": stage, "images": total, **used},
    )
