"""The one training loop, and accuracy; `module` takes pixels in [0, 1] to logits everywhere."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeprune.errors import ModelError, UsageError
from edgeprune.nn import checkpoint, objectives
from edgeprune.nn.batchnorm import recalibrate_bn
from edgeprune.nn.calling import logits, modes
from edgeprune.nn.data import Split
from edgeprune.nn.progress import bar
from edgeprune.recipe import TuneTable

__all__ = ["History", "accuracy", "augment", "fit", "mean_loss", "recalibrate_bn"]

MOMENTUM = 0.9
MAX_GRAD_NORM = 5.0
WARM_UP_SHARE = 0.05
CHECKPOINT = "training.pt"


@dataclass(frozen=True)
class History:
    """Mean loss of each epoch, and how many of them an interrupted run had done before."""

    losses: tuple[float, ...]
    resumed: int = 0


@dataclass(frozen=True)
class _Loop:
    """What every step needs. memory_format: how images and weights lie in memory while training."""

    module: nn.Module
    split: Split
    table: TuneTable
    teacher: nn.Module | None
    seed: int
    memory_format: torch.memory_format

    @property
    def batch(self) -> int:
        return min(self.table.batch, len(self.split))

    @property
    def steps(self) -> int:
        """Steps of an epoch; a rest that fills no batch waits for another epoch's order."""
        return len(self.split) // self.batch


def fit(
    module: nn.Module,
    split: Split,
    table: TuneTable,
    *,
    teacher: nn.Module | None = None,
    seed: int,
    scratch: Path,
) -> History:
    """Train in place with SGD (Nesterov momentum), warm-up and cosine; the last epoch's weights stay.

    Each epoch's state goes to `scratch`. Called again with the same arguments after an interruption, the
    weights become bit for bit those of an undisturbed run (same machine, same number of threads).

    Args:
        module: pixels in [0, 1] to logits (N, K); parameters that ask for no gradient stay as they are.
        split: images to train on.
        table: epochs, lr, batch, weight_decay, distill, temperature, augment, objective.
        teacher: a network to imitate with weight `table.distill`, or None.
        seed: decides the order, the augmentation and dropout.
        scratch: a folder for the checkpoint; made if need be.

    Raises:
        UsageError: fewer than two images, or an objective that is not known.
        ModelError: the loss is not finite any more, or the network fails in training mode.
    """
    objective = objectives.objective(table.objective)
    if len(split) < 2:
        raise UsageError(f"{split.name} has {len(split)} image, training needs at least 2")
    teacher = teacher if table.distill > 0 else None
    loop = _Loop(module, split, table, teacher, seed, _memory_format(module, split))
    _lay_out(module, loop.memory_format)
    optimizer = _optimizer(module, table)
    saved = checkpoint.Checkpoint(scratch / CHECKPOINT, _key(loop))
    losses = saved.restore(module, optimizer)
    resumed = len(losses)
    with modes(module, teacher), bar(table.epochs * loop.steps, "training") as advance:
        advance(resumed * loop.steps)
        for epoch in range(resumed, table.epochs):
            total = 0.0
            for step, loss in enumerate(_epoch(loop, epoch, objective, optimizer)):
                total += loss
                advance(1, f"training, epoch {epoch + 1} of {table.epochs}, loss {total / (step + 1):.3f}")
            losses.append(total / loop.steps)
            saved.save(module, optimizer, losses)
    _lay_out(module, torch.contiguous_format)
    return History(tuple(losses), resumed)


def accuracy(module: nn.Module, split: Split, batch: int = 500) -> tuple[int, int]:
    """How many images of a part are classified right, and how many there are; what isn't finite is wrong.

    Raises:
        ModelError: the network fails on the images.
    """
    correct = 0
    with modes(None, module), torch.no_grad(), bar(len(split), f"accuracy on {split.name}") as advance:
        for x, y in split.batches(batch):
            answer = logits(module, x)
            correct += int(((answer.argmax(1) == y) & answer.isfinite().all(1)).sum())
            advance(len(y))
    return correct, len(split)


def mean_loss(module: nn.Module, images: Tensor, labels: Tensor, batch: int = 256) -> float:
    """Mean cross-entropy over images (n, C, H, W) with labels (n,), in evaluation mode; may be NaN.

    Raises:
        ModelError: the network fails on the images.
    """
    total = 0.0
    with modes(None, module), torch.no_grad():
        for x, y in zip(images.split(batch), labels.split(batch), strict=True):
            total += float(functional.cross_entropy(logits(module, x), y, reduction="sum"))
    return total / len(images)


def _epoch(
    loop: _Loop, epoch: int, objective: objectives.Objective, optimizer: torch.optim.Optimizer
) -> Iterator[float]:
    """Train for an epoch; gives the loss of each step. Chance depends on the seed and the epoch alone."""
    generator = torch.Generator().manual_seed(_epoch_seed(loop.seed, epoch, "order"))
    order = torch.randperm(len(loop.split), generator=generator)[: loop.steps * loop.batch]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_epoch_seed(loop.seed, epoch, "dropout"))
        for step, (x, y) in enumerate(loop.split.batches(loop.batch, order)):
            seen = augment(x, generator) if loop.table.augment else x
            _set_lr(optimizer, loop, epoch * loop.steps + step)
            loss = _loss(loop, objective, seen.contiguous(memory_format=loop.memory_format), y)
            value = float(loss.detach())
            if not math.isfinite(value):
                where = f"epoch {epoch + 1}, step {step + 1} of {loop.steps}"
                hint = f"lower the learning rate: --set tune.lr={loop.table.lr / 10:g}"
                raise ModelError(f"training diverged: the loss is {value} in {where}", hint)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(_trained(loop.module), MAX_GRAD_NORM)
            optimizer.step()
            yield value


def _loss(loop: _Loop, objective: objectives.Objective, x: Tensor, y: Tensor) -> Tensor:
    if loop.teacher is None:
        return objective(loop.module, x, y)
    with torch.no_grad():
        wanted = logits(loop.teacher, x)
    answer = logits(loop.module, x)
    return objectives.distillation(answer, wanted, y, loop.table.distill, loop.table.temperature)


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image by up to an eighth of its height, with mirrored borders, and mirror every second one.

    Args:
        x: (N, C, H, W).
        generator: decides the shifts and mirrors.
    """
    count, _, height, width = x.shape
    reach = min(height // 8, width - 1)
    if reach:
        padded = functional.pad(x, (reach, reach, reach, reach), mode="reflect")
        shifts = torch.randint(0, 2 * reach + 1, (count, 2), generator=generator).tolist()
        x = torch.stack([padded[i, :, a : a + height, b : b + width] for i, (a, b) in enumerate(shifts)])
    mirrored = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
    return torch.where(mirrored, x.flip(3), x)


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _optimizer(module: nn.Module, table: TuneTable) -> torch.optim.SGD:
    """SGD; weight decay for kernels and matrices, not for biases and normalization."""
    decayed = [p for p in _trained(module) if p.ndim > 1]
    plain = [p for p in _trained(module) if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": table.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    if not decayed and not plain:
        raise ModelError(
            "the network has no parameter that can be trained", "set requires_grad on its parameters"
        )
    return torch.optim.SGD(groups, lr=table.lr, momentum=MOMENTUM, nesterov=True)


def _set_lr(optimizer: torch.optim.Optimizer, loop: _Loop, step: int) -> None:
    """Linear warm-up over the first steps, then half a cosine down to zero."""
    total = loop.table.epochs * loop.steps
    warm = max(1, round(WARM_UP_SHARE * total))
    falling = (1 + math.cos(math.pi * (step - warm) / max(1, total - warm))) / 2
    share = (step + 1) / warm if step < warm else falling
    for group in optimizer.param_groups:
        group["lr"] = loop.table.lr * share


def _epoch_seed(seed: int, epoch: int, purpose: str) -> int:
    digest = hashlib.sha256(f"{seed} {epoch} {purpose}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def _memory_format(module: nn.Module, split: Split) -> torch.memory_format:
    """Channels last is a third faster on CPUs; networks that call `view` on feature maps fail with it."""
    x = split.take(torch.arange(2)).contiguous(memory_format=torch.channels_last)
    try:
        with modes(None, module), torch.no_grad():
            logits(module, x)
    except ModelError:
        return torch.contiguous_format
    return torch.channels_last


def _lay_out(module: nn.Module, memory_format: torch.memory_format) -> None:
    for parameter in module.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=memory_format)


def _key(loop: _Loop) -> str:
    """Tells whether a checkpoint belongs to this training: same settings, same start, as many images."""
    networks = [loop.module] if loop.teacher is None else [loop.module, loop.teacher]
    return checkpoint.key(f"{loop.table!r} {loop.seed} {len(loop.split)}", networks)
