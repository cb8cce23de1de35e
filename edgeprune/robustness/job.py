"""The types of an evaluation under attack: the model, the attacks, and the verdict on every image."""

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from edgeprune import plugins
from edgeprune.attacks import STANDARD, Attack
from edgeprune.errors import UsageError
from edgeprune.models import Logits, as_logits
from edgeprune.quantities import eps_of
from edgeprune.recipe import AttackTable
from edgeprune.train import Ball
from edgeprune.version import __version__

RESULT_VERSION = 3
# The verdict on an image that is misclassified without an attack.
CLEAN = "clean"


@dataclass(frozen=True, eq=False)
class ModelUnderAttack:
    """The artifact whose outputs count, and the networks whose gradients are used.

    answers: the artifact: its session, or the network in torch. Pixels in [0, 1] to logits.
    twin: the network in torch with the gradients, or None; `answers` itself where that is a network.
    others: name -> network whose adversarial images are tried too.
    fast: the same outputs for large batches, or None; images that break it are tried again on `answers`.
    straight: of a quantized file, its own graph with gradients through the rounding (`onnx_module`), or None.
    own: `twin` was read from the file; `proven` checks what was.
    asked: entered while there are many queries; keeps a session on a device open.
    """

    name: str
    sha256: str
    answers: Logits
    twin: nn.Module | None = None
    others: Mapping[str, nn.Module] = field(default_factory=dict)
    fast: Logits | None = None
    where: str = "local"
    notes: tuple[str, ...] = ()
    straight: nn.Module | None = None
    own: bool = False
    asked: Callable[[], AbstractContextManager[object]] = nullcontext

    @property
    def is_network(self) -> bool:
        """Whether the network that gives gradients is also the one that is judged."""
        return self.answers is self.twin

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """All networks whose gradients are used."""
        return tuple(n for n in (self.twin, self.straight, *self.others.values()) if n is not None)


@dataclass(frozen=True)
class Job:
    """The attacks in their order. data: a digest of the images."""

    table: AttackTable
    ball: Ball
    attacks: Mapping[str, Attack]
    seed: int
    data: str

    def key(self, victim: ModelUnderAttack) -> str:
        """A hash of all that the verdicts depend on."""
        members = {name: [type(a).__qualname__, _fields(a)] for name, a in self.attacks.items()}
        parts = (
            RESULT_VERSION, __version__, victim.sha256, victim.where, victim.is_network,
            victim.twin is not None, victim.own, victim.straight is not None, sorted(victim.others), asdict(self.table),
            members, self.seed, self.data,
        )  # fmt: skip
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=repr).encode()).hexdigest()[:16]

    @property
    def parameters(self) -> dict[str, dict[str, object]]:
        """The options of every attack."""
        return {name: _fields(attack) for name, attack in self.attacks.items()}


@dataclass(frozen=True)
class Verdicts:
    """The verdict on every image, in the order of the split.

    by: "" for an image that survived, "clean" for one misclassified without an attack, or the name of the attack.
    tried, queries, seconds: of each attack: its images, their forward passes, and its time. how: how gradients were
    obtained. steps: all attacks in their order, whether or not an image was left for them.
    """

    by: tuple[str, ...]
    tried: Mapping[str, int]
    queries: Mapping[str, int]
    seconds: Mapping[str, float]
    how: str
    batch: int
    steps: tuple[str, ...] = ()

    @property
    def clean_right(self) -> tuple[bool, ...]:
        """Which images are right without an attack."""
        return tuple(by != CLEAN for by in self.by)

    @property
    def survived(self) -> tuple[bool, ...]:
        """Which images are right under every attack."""
        return tuple(not by for by in self.by)

    @property
    def broken(self) -> dict[str, int]:
        """Attack -> how many images it broke of those that were left, in the order in which they ran."""
        return {name: self.by.count(name) for name in self.tried if name != CLEAN}


def attack_job(table: AttackTable, *, seed: int, data: str) -> Job:
    """What a table means."""
    if table.name in ("none", "auto"):
        raise UsageError(f"attack.name = {table.name!r} is no attack", "accepted: fgsm, pgd, standard")
    ball = Ball(table.norm, eps_of(table.eps, table.norm))
    options = {"steps": table.steps, "restarts": table.restarts} if table.name == "pgd" else {}
    names = STANDARD if table.name == "standard" else (table.name,)
    return Job(table, ball, {name: plugins.build("attacks", name, options) for name in names}, seed, data)


def ask(answers: Logits, x: Tensor) -> Tensor:
    """The logits (N, K) for pixels (N, C, H, W), without gradients."""
    with torch.no_grad():
        return as_logits(answers)(x)


def wrong(answers: Logits, x: Tensor, y: Tensor) -> Tensor:
    """Misclassified images, bool (N,) on the CPU; logits that are not finite are wrong."""
    found = ask(answers, x)
    right = (found.argmax(1) == y.to(found.device)) & found.isfinite().all(1)
    return ~right.cpu()


def _fields(attack: Attack) -> dict[str, object]:
    options: Any = attack
    return {f.name: getattr(attack, f.name) for f in fields(options)}
