"""Which attacks a victim goes through, in which order, and how each makes its images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from edgeprune.attacks import Attack, Logits
from edgeprune.errors import UsageError
from edgeprune.nn.calling import logits, modes
from edgeprune.nn.data import Split
from edgeprune.nn.perturb import crafting
from edgeprune.nn.placement import CPU, Placement, fastest, home
from edgeprune.stages.attack_job import CLEAN, Job, Victim
from edgeprune.stages.attack_to_the_end import Advance, Craft, apgd_ce, pgd

# Attacks stop at the first image that the network in torch gets wrong, which a file that rounds otherwise, or another
# network, may still get right. What is to be replayed there comes from attacks that go on to the end.
TO_THE_END = "-to-the-end"
GO_ON = {"standard": ("apgd-ce", apgd_ce), "pgd": ("pgd", pgd)}
# What attacks are called that have their gradients from the straight-through twin of a quantized file.
STRAIGHT = "-straight-through"
NO_GRADIENT = (
    "No gradient reaches the network's input (detach, argmax or rounding in its forward): attacks without gradients "
    "alone were used, and they overstate robustness."
)


@dataclass(frozen=True)
class Reach:
    """Whether gradients reach the images: of the network `twin`, and of the straight-through twin of the file."""

    twin: bool
    straight: bool


@dataclass(frozen=True)
class Step:
    """One attack on what is left. images: lays a batch out on the device where the attack wants it."""

    name: str
    craft: Craft
    images: Callable[[Tensor], Tensor]


@contextmanager
def placed(victim: Victim, split: Split) -> Iterator[Placement]:
    """All networks in evaluation mode on the fastest device that they take; afterwards as and where they were.

    A victim that answers elsewhere has its session open meanwhile.
    """
    networks = victim.networks
    with ExitStack() as stack:
        stack.enter_context(victim.asked())
        stack.enter_context(home(networks))
        for network in networks:
            stack.enter_context(modes(None, network))
        example = split.take(torch.arange(min(2, len(split))))
        yield fastest(networks, example) if networks else Placement(CPU, torch.contiguous_format)


def reaches(network: nn.Module | None, x: Tensor) -> bool:
    """Whether a gradient reaches the input of a network, for images x on its device.

    Raises:
        ModelError: the network fails on the images.
    """
    if network is None:
        return False
    with crafting(network), torch.enable_grad():
        point = x.detach().requires_grad_()
        answer = logits(network, point)
        if not answer.requires_grad:
            return False
        return torch.autograd.grad(answer.sum(), point, allow_unused=True)[0] is not None


def how_words(victim: Victim, reach: Reach) -> str:
    """How gradients are had, in words."""
    more = " and on its straight-through twin" if reach.straight else ""
    if victim.twin is None:
        return "black box on the file: no gradients, which overstates robustness"
    if not (reach.twin or reach.straight):
        return "black box: no gradient reaches the input, which overstates robustness"
    if victim.is_network:
        return "white box"
    whose = "file's own graph in torch" if victim.own else "torch network"
    return f"white box on the {whose}{more}, replayed on the file"


def steps_of(victim: Victim, job: Job, placement: Placement, reach: Reach) -> tuple[Step, ...]:
    """The attacks in the order in which they run, after a look at the images as they are.

    First those with gradients of the network in torch, then, for a quantized file, those with gradients of its
    straight-through twin, then those that only ask. A file also gets what PGD, or in the standard evaluation APGD-CE,
    finds when it goes on to the end, and every victim gets what that finds on the others.

    An attack with gradients is left out where there are none; where the network is cut off from its input, it is left
    out if another one only asks, and goes where chance leads otherwise.

    Raises:
        UsageError: nothing is left to attack with.
    """
    white = _with_gradients(job)
    found: list[Step] = []
    if white and job.table.name in GO_ON:
        attack, craft = GO_ON[job.table.name]
        found = [
            Step(f"{attack}{from_(name)}", craft(network, job), placement.images)
            for name, network in victim.others.items()
        ]
    if victim.twin is not None and (reach.twin or len(white) == len(job.attacks)):
        goes_on = reach.twin and not victim.is_network
        found = _climbing(victim.twin, job, placement, goes_on=goes_on, then=found)
    if victim.straight is not None and reach.straight:
        for step in _climbing(victim.straight, job, placement, goes_on=True):
            found.append(replace(step, name=f"{step.name}{STRAIGHT}"))
    found += [_asking(n, a, job, victim, placement) for n, a in job.attacks.items() if n not in white]
    if not found:
        raise UsageError(
            f"--attack {job.table.name} needs gradients, and {victim.name} has none",
            "take --attack standard, which asks without gradients too; or give the run directory or the torch model",
        )
    return (Step(CLEAN, _as_they_are, placement.images), *found)


def from_(name: str) -> str:
    """What the names of attacks end in whose images were made on another network."""
    return f"-from-{name}"


def _with_gradients(job: Job) -> dict[str, Attack]:
    return {name: attack for name, attack in job.attacks.items() if attack.gradients}


def _climbing(
    network: nn.Module, job: Job, placement: Placement, *, goes_on: bool, then: Sequence[Step] = ()
) -> list[Step]:
    """The attacks with the gradients of a network; after the first one that which goes on to the end, and `then`."""
    found = [
        Step(name, _crafting(attack, network, job), placement.images)
        for name, attack in _with_gradients(job).items()
    ]
    more: list[Step] = []
    if goes_on and job.table.name in GO_ON:
        name, craft = GO_ON[job.table.name]
        more = [Step(f"{name}{TO_THE_END}", craft(network, job), placement.images)]
    return [*found[:1], *more, *then, *found[1:]]


def _as_they_are(x: Tensor, y: Tensor, generator: torch.Generator, advance: Advance) -> tuple[Tensor, int]:
    advance(len(x))
    return x, len(x)


def _crafting(attack: Attack, network: nn.Module, job: Job) -> Craft:
    def craft(x: Tensor, y: Tensor, generator: torch.Generator, advance: Advance) -> tuple[Tensor, int]:
        found = attack(network, x, y.to(x.device), job.ball, generator, advance)
        return found.images, int(found.queries.sum())

    return craft


def _asking(name: str, attack: Attack, job: Job, victim: Victim, placement: Placement) -> Step:
    """An attack that only asks: the artifact itself (on its device), or a copy of it that answers many at a time."""
    answers: Logits = victim.fast or victim.answers

    def craft(x: Tensor, y: Tensor, generator: torch.Generator, advance: Advance) -> tuple[Tensor, int]:
        with torch.no_grad():
            found = attack(answers, x, y.to(x.device), job.ball, generator, advance)
        return found.images, int(found.queries.sum())

    return Step(name, craft, placement.images if victim.is_network else Tensor.cpu)
