"""Random shifts and mirrors of a batch of images, decided by a generator alone, and which of them a network minds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeprune.intervals import binomial
from edgeprune.nn import scoring, team
from edgeprune.nn.data import Data, spread
from edgeprune.nn.schedule import chance
from edgeprune.recipe import TuneTable

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
        x: (N, C, H, W).
        generator: on the CPU; decides the shifts and mirrors.
        count: of how many images `x` is a part; N when not given. What an image gets does not depend on which
            part it comes in.
        part: which of those images `x` has.
        kinds: which of the two is done.
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
        module: the dense network, pixels in [0, 1] to logits.
        data: its training images are looked at, at most 2,048 or 20 of each class.
        table: what the user wants; a kind that is asked for by its word is done, with a warning where it harms.
        seed: decides which images are looked at, and their shifts.

    Raises:
        ModelError: the network fails on the images.
    """
    asked = table.augment != "auto"
    wanted = KINDS[table.augment if asked else "on"]
    if data.train is None or not table.epochs or not wanted:
        return table, ()
    minded = team.tell(_minded(module, data, wanted, seed))
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
    """The kinds of change that a network minds, and what they cost it."""
    split, classes = data.train, len(data.labels)
    assert split is not None
    rows = spread(split.labels, max(LOOKED_AT, LOOKED_AT_PER_CLASS * classes), seed)
    plain, found = scoring.right(module, split, rows), {}
    for kind in kinds:
        generator = chance(seed, kind, "minded")

        def change(x: Tensor, kind: str = kind, generator: torch.Generator = generator) -> Tensor:
            return x.flip(3) if kind == MIRROR else augment(x, generator, kinds=(SHIFT,))

        changed = scoring.right(module, split, rows, change)
        where, n, before, after = _fall(plain, changed, split.labels[rows], data.labels)
        if n:
            right = f"the dense network classifies {before} right, and {after} when they are {kind}ed"
            found[kind] = f"of {n} images of {where} {right}"
    return found


def _fall(plain: Tensor, changed: Tensor, labels: Tensor, names: Sequence[str]) -> tuple[str, int, int, int]:
    """The class that falls the most among those that clearly fall, or all: name, images, right ones before and after.

    Args:
        plain, changed: which images are classified right, bool (n,).
        labels: int64 (n,).
        names: of the classes.

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
