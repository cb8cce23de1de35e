"""What a training is made of: the images and settings, what a method adds to it, and what is left of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgeprune.nn.data import Split
from edgeprune.recipe import TuneTable

Loss = Callable[[nn.Module, Tensor, Tensor, torch.Generator], Tensor]


def _nothing(*_: object) -> None:
    """What a hook does that nobody gave."""


def _no_state() -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Course:
    """What a network is trained on, and how.

    split: images to train on; in a team (`nn.team`) the same in every process.
    table: epochs, lr, batch, optimizer, objective and its attack, keep, mixed and so on.
    seed: decides the order, the augmentation, dropout and where attacks start.
    scratch: a folder for the checkpoint, of this training alone; made if need be.
    teacher: a network to imitate with weight `table.distill`, or None.
    validation: images on which the best epoch is chosen, where `table.keep` is "best"; not among those of `split`.
    """

    split: Split
    table: TuneTable
    seed: int
    scratch: Path
    teacher: nn.Module | None = None
    validation: Split | None = None


@dataclass(frozen=True)
class Hooks:
    """What a method does while a network trains; every field has a default that does nothing.

    In a team each is called in every process and must do the same in all; `state` not at the same time, so that it
    must not wait for the others. The network is on its training device, in training mode; its parameters are the
    objects that they were, but kernels may lie in memory channels last (`view(-1)` fails, `flatten` does not).

    loss: (module, x, y, generator) to the scalar loss, in the place of the table's objective; the generator decides
        about attacks. Where the training is mixed, layers give bfloat16 (`perturb.full` makes it float32).
    penalty: a scalar that is added to the loss.
    before_step: gradients are there, of all processes, not yet clipped.
    after_step: (optimizer, learning rate of the step).
    after_epoch: (number of the epoch just done, from 0; optimizer), before its validation and its checkpoint.
    state: tensors, numbers and text, saved with each checkpoint and with the best epoch. What it gives before the
        first step tells trainings apart.
    restore: takes what `state` gave, before the first step of a training that goes on; and, where `table.keep` is
        "best", as it was after the best epoch at the very end.
    """

    loss: Loss | None = None
    penalty: Callable[[], Tensor] | None = None
    before_step: Callable[[], None] = _nothing
    after_step: Callable[[torch.optim.Optimizer, float], None] = _nothing
    after_epoch: Callable[[int, torch.optim.Optimizer], None] = _nothing
    state: Callable[[], dict[str, Any]] = _no_state
    restore: Callable[[Mapping[str, Any]], None] = _nothing


NO_HOOKS = Hooks()


@dataclass(frozen=True)
class History:
    """Mean loss of each epoch, and how many of them an interrupted run had done before.

    validation: accuracy in [0, 1] after each epoch, under the objective's attack, where `table.keep` is "best".
    best: the number of the epoch whose weights stay, from 0; None for a training without epochs.
    """

    losses: tuple[float, ...]
    resumed: int = 0
    validation: tuple[float, ...] = ()
    best: int | None = None
