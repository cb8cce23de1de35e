"""Compare a network that was read from a file with the file; only if they agree its gradients are used."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from edgeprune.data import Split
from edgeprune.errors import ModelError
from edgeprune.models import logits
from edgeprune.robustness.attack_plan import placed
from edgeprune.robustness.job import ModelUnderAttack, ask

# Images that are compared; the share on which both must predict the same class.
IMAGES = 256
SAME = 0.99
# Difference of logits, as a share of the largest one.
FLOAT, QUANTIZED = 1e-3, 0.05

Log = Callable[[str], None]


@dataclass(frozen=True)
class Alike:
    """How a network compares to a file. same: share of images with the same class; apart: root mean square."""

    same: float
    apart: float
    images: int


def proven(victim: ModelUnderAttack, split: Split, *, log: Log) -> ModelUnderAttack:
    """The model, without networks from its file whose outputs differ from the file's; a note says so.

    ONNX Runtime may compute quantized graphs in another order, and a different rounding is a whole step: classes whose
    logits are that near count as the same.
    """
    network = victim.straight if victim.straight is not None else victim.twin if victim.own else None
    if network is None:
        return victim
    tolerance = QUANTIZED if victim.straight is not None else FLOAT
    x = split.take(torch.arange(min(IMAGES, len(split))))
    if not len(x):
        return victim
    wanted = ask(victim.fast or victim.answers, x)
    try:
        with placed(victim, split) as placement, torch.no_grad():
            parts = placement.images(x).split(32)
            found = torch.cat([logits(network, part).float().cpu() for part in parts])
    except ModelError as error:
        return _doubted(victim, f"it fails on images ({error.message})", log)
    if found.shape != wanted.shape:
        return _doubted(victim, f"it answers {tuple(found.shape)}, the file {tuple(wanted.shape)}", log)
    alike = compared(wanted, found, tolerance)
    if alike.same < SAME or not alike.apart <= tolerance:
        words = (
            f"on {alike.images} images it names the same class on {100 * alike.same:.1f} %, its logits are "
            f"{100 * alike.apart:.2g} % of the largest one away"
        )
        return _doubted(victim, words, log)
    log(
        f"attack: gradients from the graph of {victim.name}; on {alike.images} images it agrees with the file on "
        f"{100 * alike.same:.1f} %"
    )
    return victim


def compared(wanted: Tensor, found: Tensor, tolerance: float) -> Alike:
    """How near the logits `found` (N, K) are to those of the file."""
    scale = float(wanted.abs().max()) or 1.0
    mine = wanted.gather(1, found.argmax(1, keepdim=True)).squeeze(1)
    same = (wanted.amax(1) - mine) <= tolerance * scale
    apart = float((found - wanted).square().mean().sqrt()) / scale
    return Alike(float(same.float().mean()), apart, len(wanted))


def _doubted(victim: ModelUnderAttack, why: str, log: Log) -> ModelUnderAttack:
    note = f"The network that was read from {victim.name} does not answer as the file does: {why}. "
    if victim.own:
        note += "Its gradients were not used; the file was only asked, which overstates robustness."
    else:
        note += "Attacks that see the quantization were not tried, which overstates robustness."
    log(f"attack: {note}")
    return replace(
        victim,
        twin=None if victim.own else victim.twin,
        straight=None,
        own=False,
        notes=(*victim.notes, note),
    )
