"""Which attacks a victim goes through, in which order, and how each makes its images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgeprune.attacks import Attack, Logits
from edgeprune.errors import UsageError
from edgeprune.nn.apgd import Task, climb, cross_entropies
from edgeprune.nn.calling import logits, modes
from edgeprune.nn.data import Split
from edgeprune.nn.perturb import crafting, full
from edgeprune.nn.placement import CPU, Placement, fastest, home
from edgeprune.stages.attack_job import CLEAN, Job, Victim

# Attacks stop at the first image that the network in torch gets wrong, which a file that rounds otherwise, or another
# network, may still get right. What is to be replayed there comes from an APGD-CE that goes on to the end.
TO_THE_END = "apgd-ce-to-the-end"
FROM = "apgd-ce-from-"
END_STEPS, END_RHO = 100, 0.75
NO_GRADIENT = (
    "No gradient reaches the network's input (detach, argmax or rounding in its forward): attacks without gradients "
    "alone were used, and they overstate robustness."
)

Advance = Callable[[int], None]
# (x, y, generator, advance) -> images to try (N, C, H, W), forward passes for one image summed over them.
Craft = Callable[[Tensor, Tensor, torch.Generator, Advance], tuple[Tensor, int]]


@dataclass(frozen=True)
class Step:
    """One attack on what is left. images: lays a batch out on the device where the attack wants it."""

    name: str
    craft: Craft
    images: Callable[[Tensor], Tensor]


@contextmanager
def placed(victim: Victim, split: Split) -> Iterator[Placement]:
    """All networks in evaluation mode on the fastest device that they take; afterwards as and where they were."""
    networks = [*([] if victim.twin is None else [victim.twin]), *victim.others.values()]
    with ExitStack() as stack:
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


def how_words(victim: Victim, white: bool) -> str:
    """How gradients are had, in words."""
    if victim.twin is None:
        return "black box on the file: no gradients, which overstates robustness"
    if not white:
        return "black box: no gradient reaches the input, which overstates robustness"
    return "white box" if victim.is_network else "white box on the torch network, replayed on the file"


def steps_of(victim: Victim, job: Job, placement: Placement, white: bool) -> tuple[Step, ...]:
    """The attacks in the order in which they run, after a look at the images as they are.

    An attack with gradients is left out where there are none; where the network is cut off from its input, it is left
    out if another one only asks, and goes where chance leads otherwise. In the standard evaluation a file also
    gets what APGD-CE finds on its network when it goes on to the end, and every victim what it finds on the others.

    Raises:
        UsageError: nothing is left to attack with.
    """
    steps = [Step(CLEAN, _as_they_are, placement.images)]
    standard = job.table.name == "standard"
    climbs = white or all(attack.gradients for attack in job.attacks.values())
    for name, attack in job.attacks.items():
        first = len(steps) == 1
        if not attack.gradients:
            steps.append(_asking(name, attack, job, victim, placement))
        elif victim.twin is not None and climbs:
            steps.append(Step(name, _crafting(attack, victim.twin, job), placement.images))
            if first and standard and white and not victim.is_network:
                steps.append(Step(TO_THE_END, _to_the_end(victim.twin, job), placement.images))
        if first and standard and attack.gradients:
            steps += [
                Step(f"{FROM}{other}", _to_the_end(network, job), placement.images)
                for other, network in victim.others.items()
            ]
    if len(steps) == 1:
        raise UsageError(
            f"--attack {job.table.name} needs gradients, and {victim.name} has none",
            "take --attack standard, which asks without gradients too; or give the run directory or the torch model",
        )
    return tuple(steps)


def _as_they_are(x: Tensor, y: Tensor, generator: torch.Generator, advance: Advance) -> tuple[Tensor, int]:
    advance(len(x))
    return x, len(x)


def _crafting(attack: Attack, network: nn.Module, job: Job) -> Craft:
    def craft(x: Tensor, y: Tensor, generator: torch.Generator, advance: Advance) -> tuple[Tensor, int]:
        found = attack(network, x, y.to(x.device), job.ball, generator, advance)
        return found.images, int(found.queries.sum())

    return craft


def _to_the_end(network: nn.Module, job: Job) -> Craft:
    """APGD-CE that takes no image for broken: to the logits comes a class that is always the likeliest, and right."""

    def answers(at: Tensor) -> Tensor:
        found = full(logits(network, at))
        return torch.cat([found, found.detach().amax(1, keepdim=True) + 1], 1)

    def loss(answer: Tensor, _always: Tensor, label: Tensor) -> Tensor:
        return cross_entropies(answer[:, :-1], label, label)

    def craft(x: Tensor, y: Tensor, generator: torch.Generator, advance: Advance) -> tuple[Tensor, int]:
        label = y.to(x.device)
        with crafting(network):
            always = torch.full_like(label, logits(network, x[:1]).shape[1])
            found = climb(
                answers, Task(x, always, label), job.ball, loss=loss, steps=END_STEPS, rho=END_RHO,
                generator=generator,
            )  # fmt: skip
        advance(len(x))
        return found.images, int(found.queries.sum())

    return craft


def _asking(name: str, attack: Attack, job: Job, victim: Victim, placement: Placement) -> Step:
    """An attack that only asks: the artifact itself, or the copy of it that answers many images at a time."""
    answers: Logits = victim.fast or victim.answers

    def craft(x: Tensor, y: Tensor, generator: torch.Generator, advance: Advance) -> tuple[Tensor, int]:
        with torch.no_grad():
            found = attack(answers, x, y.to(x.device), job.ball, generator, advance)
        return found.images, int(found.queries.sum())

    return Step(name, craft, placement.images if victim.is_network else Tensor.cpu)
