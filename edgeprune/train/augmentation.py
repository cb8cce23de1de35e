"""Random shifts and mirrors of training images, and which of them harm a network's accuracy."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeprune import distributed
from edgeprune.confidence import binomial
from edgeprune.data import Data, Split, spread
from edgeprune.recipe import TuneTable
from edgeprune.train import evaluation
from edgeprune.train.job import seeded_generator

SHIFT, MIRROR = "shift", "mirror"
# The values of TuneTable.augment but "auto", which `choose_augmentation` turns into one of them.
KINDS = {"on": (SHIFT, MIRROR), SHIFT: (SHIFT,), MIRROR: (MIRROR,), "off": ()}
DONE = {SHIFT: f"{SHIFT}ed by up to an eighth of their height", MIRROR: f"{MIRROR}ed"}
# A change is harmful when the accuracy of a class falls significantly by more than this share.
MAX_DROP = 0.10
SIGNIFICANCE = 0.05
TESTED = 2048
TESTED_PER_CLASS = 20


def augment(
    x: Tensor,
    generator: torch.Generator,
    *,
    count: int | None = None,
    part: slice = slice(None),
    kinds: Sequence[str] = KINDS["on"],
) -> Tensor:
    """Shift each image by up to an eighth of its height, with mirrored borders, and mirror half of them.

    Args:
        count: size of the batch of which `x` is the slice `part`; len(x) when not given. How an image is changed
            does not depend on how the batch is sliced.
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


def choose_augmentation(
    module: nn.Module, data: Data, table: TuneTable, seed: int
) -> tuple[TuneTable, tuple[str, ...]]:
    """The table with "auto" replaced by the changes that do not harm the dense network, and notes on the choice.

    A change is harmful when a class, or all images together, lose clearly more than a tenth of their accuracy by it:
    the lower end of the exact interval of the share that is lost lies above, at an error of 5 % over all classes.
    It is measured on at most 2,048 training images or 20 of each class.
    """
    automatic = table.augment == "auto"
    candidates = KINDS["on" if automatic else table.augment]
    if data.train is None or not table.epochs or not candidates:
        return table, ()
    harmful = distributed.broadcast_object(_harmful(module, data, data.train, candidates, seed))
    chosen = tuple(kind for kind in candidates if not automatic or kind not in harmful)
    changes = " and ".join(DONE[kind] for kind in chosen)
    notes = [f"Training images are {changes} at random (tune.augment)."] if chosen else []
    for kind, harm in harmful.items():
        if automatic:
            notes.append(f"Training images are not {kind}ed (tune.augment): {harm}.")
        else:
            notes.append(f"WARNING: tune.augment = {table.augment!r} may teach what is wrong: {harm}.")
    augment = next(name for name, kinds in KINDS.items() if kinds == chosen)
    return replace(table, augment=augment), tuple(notes)


def _harmful(module: nn.Module, data: Data, split: Split, kinds: Sequence[str], seed: int) -> dict[str, str]:
    rows = spread(split.labels, max(TESTED, TESTED_PER_CLASS * len(data.labels)), seed)
    plain, found = evaluation.right(module, split, rows), {}
    for kind in kinds:
        generator = seeded_generator(seed, kind, "minded")

        def change(x: Tensor, kind: str = kind, generator: torch.Generator = generator) -> Tensor:
            return x.flip(3) if kind == MIRROR else augment(x, generator, kinds=(SHIFT,))

        changed = evaluation.right(module, split, rows, change)
        where, n, before, after = _largest_drop(plain, changed, split.labels[rows], data.labels)
        if n:
            right = f"the dense network classifies {before} right, and {after} when they are {kind}ed"
            found[kind] = f"of {n} images of {where} {right}"
    return found


def _largest_drop(
    plain: Tensor, changed: Tensor, labels: Tensor, names: Sequence[str]
) -> tuple[str, int, int, int]:
    """Of the classes that lose significantly, or all: name, images, and right ones before and after the change.

    Args:
        plain, changed: which images are classified right, bool (n,).

    Returns:
        Zero images where nothing is significant.
    """
    groups = {f"class {name!r}": labels == number for number, name in enumerate(names)}
    groups["all classes"] = torch.ones_like(labels, dtype=torch.bool)
    level = 1 - 2 * SIGNIFICANCE / len(groups)
    worst = ("", 0, 0, 0)
    for name, members in groups.items():
        n, before, after = (int(value.sum()) for value in (members, plain[members], changed[members]))
        significant = before > after and binomial(before - after, n, level)[0] > MAX_DROP
        if significant and (before - after) * max(worst[1], 1) > (worst[2] - worst[3]) * n:
            worst = (name, n, before, after)
    return worst
