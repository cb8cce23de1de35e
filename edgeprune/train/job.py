"""A training job: its optimizer, learning rate and seeds, and the hooks of a method."""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgeprune.data import Split
from edgeprune.errors import ModelError
from edgeprune.quantities import check_choice
from edgeprune.recipe import OPTIMIZERS, TuneTable

MOMENTUM = 0.9
WARM_UP_SHARE = 0.05


def trained(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that require a gradient."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def optimizer_of(module: nn.Module, table: TuneTable) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, or AdamW; weight decay for kernels and matrices, not for biases and normalization."""
    decayed = [p for p in trained(module) if p.ndim > 1]
    plain = [p for p in trained(module) if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": table.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    if not decayed and not plain:
        raise ModelError(
            "the network has no parameter that can be trained", "set requires_grad on its parameters"
        )
    check_choice("tune.optimizer", table.optimizer, OPTIMIZERS)
    if table.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=table.lr, momentum=MOMENTUM, nesterov=True)
    return torch.optim.AdamW(groups, lr=table.lr)


def momentum(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Tensor:
    """SGD's momentum buffer itself, or AdamW's m / (sqrt(v) + 1e-8) without bias correction.

    Zeros before the first step and for a parameter that the optimizer does not train.
    """
    state = optimizer.state.get(parameter, {})
    buffer = state.get("momentum_buffer")
    if buffer is not None:
        return buffer
    if "exp_avg" in state:
        return state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-8)
    return torch.zeros_like(parameter)


def lr_factor(step: int, total: int) -> float:
    """Linear warm-up to 1 over the first steps, then half a cosine down to 0; `step` counts from 0."""
    warm = max(1, round(WARM_UP_SHARE * total))
    if step < warm:
        return (step + 1) / warm
    return (1 + math.cos(math.pi * (step - warm) / max(1, total - warm))) / 2


def seed_of(*parts: object) -> int:
    """A seed from whole numbers and text, the same on every machine."""
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:7], "big")


def seeded_generator(*parts: object) -> torch.Generator:
    """A generator with `seed_of` the parts, on the CPU so that every device gets the same numbers."""
    return torch.Generator().manual_seed(seed_of(*parts))


Loss = Callable[[nn.Module, Tensor, Tensor, torch.Generator], Tensor]


def _do_nothing(*_: object) -> None:
    """The default of a hook."""


@dataclass(frozen=True)
class TrainingJob:
    """What a network is trained on, and how.

    split: training images; the same in every process of `distributed`.
    seed: of the order, the augmentation, dropout and the starts of attacks.
    scratch: a folder for the checkpoint of this training alone; made where it is missing.
    teacher: distilled from with weight `table.distill`.
    validation: images that choose the best epoch, where `table.keep` is "best"; disjoint from `split`.
    """

    split: Split
    table: TuneTable
    seed: int
    scratch: Path
    teacher: nn.Module | None = None
    validation: Split | None = None


@dataclass(frozen=True)
class Hooks:
    """What a method does while a network trains; the defaults do nothing.

    With several processes each hook runs in every one and must do the same in all; `state` not at the same time, so it
    must not wait for the others. The network is on its training device, in training mode; its parameters are the same
    objects as before, but kernels may be channels last (`view(-1)` fails, `flatten` does not).

    loss: (module, x, y, generator for attacks) to the scalar loss, instead of the table's objective. With mixed
        precision layers return bfloat16 (`models.full` makes it float32).
    penalty: a scalar that is added to the loss.
    before_step: gradients are averaged over the processes, not yet clipped.
    after_step: (optimizer, learning rate of the step).
    after_epoch: (epoch, from 0; optimizer), before its validation and its checkpoint.
    state: tensors, numbers and text, saved with each checkpoint and with the best epoch. Its value before the
        first step is part of the checkpoint's key.
    restore: takes a saved `state` before the first step of a resumed training; and that of the best epoch at the end,
        where `table.keep` is "best".
    """

    loss: Loss | None = None
    penalty: Callable[[], Tensor] | None = None
    before_step: Callable[[], None] = _do_nothing
    after_step: Callable[[torch.optim.Optimizer, float], None] = _do_nothing
    after_epoch: Callable[[int, torch.optim.Optimizer], None] = _do_nothing
    state: Callable[[], dict[str, Any]] = dict
    restore: Callable[[Mapping[str, Any]], None] = _do_nothing


NO_HOOKS = Hooks()


@dataclass(frozen=True)
class History:
    """Mean loss of each epoch; resumed: how many of them an interrupted run had completed.

    validation: accuracy in [0, 1] after each epoch, under the objective's attack, where `table.keep` is "best".
    best: the epoch, from 0, whose weights stay; None for a training without epochs.
    """

    losses: tuple[float, ...]
    resumed: int = 0
    validation: tuple[float, ...] = ()
    best: int | None = None
