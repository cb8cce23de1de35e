"""Random shifts and mirrors of a batch of images, decided by a generator alone, and which of them a network minds."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeprune import distributed
from edgeprune.confidence import binomial
from edgeprune.data import Data, Split, spread
from edgeprune.errors import ModelError, UsageError
from edgeprune.quantities import suggest
from edgeprune.recipe import OPTIMIZERS, TuneTable
from edgeprune.train import evaluation

MOMENTUM = 0.9
WARM_UP_SHARE = 0.05


def trained(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that ask for a gradient."""
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
    if table.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=table.lr, momentum=MOMENTUM, nesterov=True)
    if table.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=table.lr)
    found = f"tune.optimizer = {table.optimizer!r} is not one of {', '.join(OPTIMIZERS)}"
    raise UsageError(found, suggest(table.optimizer, OPTIMIZERS))


def momentum(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Tensor:
    """What an optimizer remembers of a parameter's gradients.

    Returns:
        Like the parameter: SGD's momentum buffer itself, of AdamW m / (sqrt(v) + 1e-8) without correction of the
        bias; zeros before the first step and for a parameter that the optimizer does not train.
    """
    state = optimizer.state.get(parameter, {})
    buffer = state.get("momentum_buffer")
    if buffer is not None:
        return buffer
    if "exp_avg" in state:
        return state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-8)
    return torch.zeros_like(parameter)


def share_of_lr(step: int, total: int) -> float:
    """Linear warm-up to 1 over the first steps, then half a cosine down to 0; `step` counts from 0."""
    warm = max(1, round(WARM_UP_SHARE * total))
    if step < warm:
        return (step + 1) / warm
    return (1 + math.cos(math.pi * (step - warm) / max(1, total - warm))) / 2


def seed_of(*parts: object) -> int:
    """A seed that depends on every part (whole numbers and words), and on nothing else."""
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:7], "big")


def chance(*parts: object) -> torch.Generator:
    """A generator on the CPU, so that every device gets the same numbers, with `seed_of` the parts."""
    return torch.Generator().manual_seed(seed_of(*parts))


EVERY = slice(None)
SHIFT, MIRROR = "shift", "mirror"
# The words of TuneTable.augment but "auto", which `decide` turns into one of them.
KINDS = {"on": (SHIFT, MIRROR), SHIFT: (SHIFT,), MIRROR: (MIRROR,), "off": ()}
DONE = {SHIFT: f"{SHIFT}ed by up to an eighth of their height", MIRROR: f"{MIRROR}ed"}
# A network minds a change when the accuracy of a class falls by more than that, and chance is no excuse.
MOST_FALL = 0.10
MISTAKEN = 0.05
LOOKED_AT = 2048
LOOKED_AT_PER_CLASS = 20


def augment(
    x: Tensor,
    generator: torch.Generator,
    *,
    count: int | None = None,
    part: slice = EVERY,
    kinds: Sequence[str] = KINDS["on"],
) -> Tensor:
    """Shift each image by up to an eighth of its height, with mirrored borders, and mirror every second one.

    Args:
        count: of how many images `x` is a part; N when not given. What an image gets does not depend on which
            part it comes in.
        part: which of those images `x` has.
    """
    whole = len(x) if count is None else count
    height, width = x.shape[2:]
    reach = min(height // 8, width - 1)
    if reach and SHIFT in kinds:
        down, right = torch.randint(0, 2 * reach + 1, (whole, 2), generator=generator)[part].unbind(1)
        padded = functional.pad(x, (reach, reach, reach, reach), mode="reflect")
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)
        x = windows[torch.arange(len(x)), :, down, right]
    if MIRROR not in kinds:
        return x
    mirrored = (torch.rand(whole, 1, 1, 1, generator=generator) < 0.5)[part]
    return torch.where(mirrored, x.flip(3), x)


def decide(module: nn.Module, data: Data, table: TuneTable, seed: int) -> tuple[TuneTable, tuple[str, ...]]:
    """The table with "auto" decided: what the dense network does not mind is done. And notes that say so.

    A change is minded when a class, or all images together, lose clearly more than a tenth of their accuracy by it:
    the lower end of the exact interval of the share that is lost lies above, at an error of 5 % over all classes.

    Args:
        data: its training images are looked at, at most 2,048 or 20 of each class.
    """
    asked = table.augment != "auto"
    wanted = KINDS[table.augment if asked else "on"]
    if data.train is None or not table.epochs or not wanted:
        return table, ()
    minded = distributed.broadcast_object(_minded(module, data, wanted, seed))
    done = [kind for kind in wanted if asked or kind not in minded]
    words = " and ".join(DONE[kind] for kind in done)
    notes = [f"Training images are {words} at random (tune.augment)."] if done else []
    for kind, harm in minded.items():
        if asked:
            notes.append(f"WARNING: tune.augment = {table.augment!r} may teach what is wrong: {harm}.")
        else:
            notes.append(f"Training images are not {kind}ed (tune.augment): {harm}.")
    word = next(word for word, kinds in KINDS.items() if kinds == tuple(done))
    return replace(table, augment=word), tuple(notes)


def _minded(module: nn.Module, data: Data, kinds: Sequence[str], seed: int) -> dict[str, str]:
    split, classes = data.train, len(data.labels)
    assert split is not None
    rows = spread(split.labels, max(LOOKED_AT, LOOKED_AT_PER_CLASS * classes), seed)
    plain, found = evaluation.right(module, split, rows), {}
    for kind in kinds:
        generator = chance(seed, kind, "minded")

        def change(x: Tensor, kind: str = kind, generator: torch.Generator = generator) -> Tensor:
            return x.flip(3) if kind == MIRROR else augment(x, generator, kinds=(SHIFT,))

        changed = evaluation.right(module, split, rows, change)
        where, n, before, after = _fall(plain, changed, split.labels[rows], data.labels)
        if n:
            right = f"the dense network classifies {before} right, and {after} when they are {kind}ed"
            found[kind] = f"of {n} images of {where} {right}"
    return found


def _fall(plain: Tensor, changed: Tensor, labels: Tensor, names: Sequence[str]) -> tuple[str, int, int, int]:
    """The class that falls the most among those that clearly fall, or all: name, images, right ones before and after.

    Args:
        plain, changed: which images are classified right, bool (n,).

    Returns:
        Zero images where nothing clearly falls.
    """
    groups = {f"class {name!r}": labels == number for number, name in enumerate(names)}
    groups["all classes"] = torch.ones_like(labels, dtype=torch.bool)
    level = 1 - 2 * MISTAKEN / len(groups)
    worst = ("", 0, 0, 0)
    for name, mine in groups.items():
        n, before, after = (int(value.sum()) for value in (mine, plain[mine], changed[mine]))
        clear = before > after and binomial(before - after, n, level)[0] > MOST_FALL
        if clear and (before - after) * max(worst[1], 1) > (worst[2] - worst[3]) * n:
            worst = (name, n, before, after)
    return worst


Loss = Callable[[nn.Module, Tensor, Tensor, torch.Generator], Tensor]


def _nothing(*_: object) -> None:
    """What a hook does that nobody gave."""


def _no_state() -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class TrainingJob:
    """What a network is trained on, and how.

    split: images to train on; in a team (`distributed`) the same in every process.
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
