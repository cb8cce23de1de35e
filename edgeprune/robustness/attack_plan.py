"""Which attacks are run on a model, in which order, and how each makes its images."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeprune import train
from edgeprune.attacks import Attack, Task, climb, cross_entropies
from edgeprune.data import Split
from edgeprune.errors import UsageError
from edgeprune.models import Logits, folded, full, logits, modes, on_replicas, temporary_hooks
from edgeprune.robustness.job import CLEAN, Job, ModelUnderAttack
from edgeprune.train import CPU, ExecutionConfig, crafting, fastest_config, restored_device

# AutoAttack's own numbers for APGD-CE.
STEPS, RHO = 100, 0.75

Advance = Callable[[int], None]
# (x, y, generator, advance) -> images to try (N, C, H, W), forward passes for one image summed over them.
Craft = Callable[[Tensor, Tensor, torch.Generator, Advance], tuple[Tensor, int]]


def apgd_ce(network: nn.Module, job: Job) -> Craft:
    """APGD-CE that never stops early: a class is added to the logits that is always the likeliest, and right."""

    def answers(quick: nn.Module, at: Tensor) -> Tensor:
        found = full(logits(quick, at))
        return torch.cat([found, found.detach().amax(1, keepdim=True) + 1], 1)

    def loss(answer: Tensor, _always: Tensor, label: Tensor) -> Tensor:
        return cross_entropies(answer[:, :-1], label, label)

    def craft(x: Tensor, y: Tensor, generator: torch.Generator, advance: Advance) -> tuple[Tensor, int]:
        label = y.to(x.device)
        with crafting(network), on_replicas(folded(network, x[:2]), x) as quick:
            always = torch.full_like(label, logits(quick, x[:1]).shape[1])
            found = climb(
                lambda at: answers(quick, at), Task(x, always, label), job.ball, loss=loss, steps=STEPS, rho=RHO,
                generator=generator,
            )  # fmt: skip
        advance(len(x))
        return found.images, int(found.queries.sum())

    return craft


def pgd(network: nn.Module, job: Job) -> Craft:
    """All steps of PGD; of several walks that which ends with the largest cross-entropy."""
    steps, walks = job.table.steps, job.table.restarts

    def craft(x: Tensor, y: Tensor, generator: torch.Generator, advance: Advance) -> tuple[Tensor, int]:
        label = y.to(x.device)
        best, height = x, torch.full(label.shape, -torch.inf, device=x.device)
        for _ in range(walks):
            found = train.pgd(network, x, label, job.ball, steps=steps, generator=generator)
            with crafting(network), torch.no_grad():
                loss = functional.cross_entropy(full(logits(network, found)), label, reduction="none")
            higher = loss > height
            best = torch.where(higher.view(-1, *[1] * (x.ndim - 1)), found, best)
            height = torch.where(higher, loss, height)
        advance(len(x))
        return best, walks * (steps + 1) * len(x)

    return craft


# Attacks stop at the first image that the network in torch gets wrong, which a file that rounds differently, or another
# network, may still get right. What is replayed there comes from attacks that continue.
TO_THE_END = "-to-the-end"
GO_ON = {"standard": ("apgd-ce", apgd_ce), "pgd": ("pgd", pgd)}
# Suffix of attacks with gradients of a quantized file's straight-through form.
STRAIGHT = "-straight-through"
NO_GRADIENT = (
    "No gradient reaches the network's input (detach, argmax or rounding in its forward): attacks without gradients "
    "alone were used, and they overstate robustness."
)


@dataclass(frozen=True)
class Reach:
    """Whether gradients reach the images in the two networks of a model."""

    twin: bool
    straight: bool


@dataclass(frozen=True)
class Step:
    """One attack on what is left. images: lays a batch out on the device where the attack wants it."""

    name: str
    craft: Craft
    images: Callable[[Tensor], Tensor]


@contextmanager
def placed(victim: ModelUnderAttack, split: Split) -> Iterator[ExecutionConfig]:
    """All networks in evaluation mode on the fastest device that they take; afterwards as and where they were."""
    networks = victim.networks
    with ExitStack() as stack:
        stack.enter_context(victim.asked())
        stack.enter_context(restored_device(networks))
        for network in networks:
            stack.enter_context(modes(None, network))
        example = split.take(torch.arange(min(2, len(split))))
        yield fastest_config(networks, example) if networks else ExecutionConfig(CPU, torch.contiguous_format)


def reaches(network: nn.Module | None, x: Tensor) -> bool:
    """Whether a gradient reaches the input of a network, for images x on its device."""
    if network is None:
        return False
    with crafting(network), torch.enable_grad():
        point = x.detach().requires_grad_()
        answer = logits(network, point)
        if not answer.requires_grad:
            return False
        return torch.autograd.grad(answer.sum(), point, allow_unused=True)[0] is not None


def describe_gradients(victim: ModelUnderAttack, reach: Reach) -> str:
    """How gradients were obtained, for a report."""
    more = " and on its straight-through surrogate" if reach.straight else ""
    if victim.twin is None:
        return "black box on the file: no gradients, which overstates robustness"
    if not (reach.twin or reach.straight):
        return "black box: no gradient reaches the input, which overstates robustness"
    if victim.is_network:
        return "white box"
    whose = "file's own graph in torch" if victim.own else "torch network"
    return f"white box on the {whose}{more}, replayed on the file"


def steps_of(
    victim: ModelUnderAttack, job: Job, placement: ExecutionConfig, reach: Reach
) -> tuple[Step, ...]:
    """The attacks in the order in which they run, after a look at the images as they are.

    First those with gradients of the network in torch, then, for a quantized file, those with gradients of its
    straight-through form, then those that need only logits. A file also gets the images of a PGD, or in the standard
    evaluation an APGD-CE, that continues past the first success, and every model gets those made on the others.
    An attack with gradients is left out where there are none; where none reaches the input, only if another attack
    needs none.
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
    found += [
        _without_gradients(n, a, job, victim, placement) for n, a in job.attacks.items() if n not in white
    ]
    if not found:
        raise UsageError(
            f"--attack {job.table.name} needs gradients, and {victim.name} has none",
            "take --attack standard, which asks without gradients too; or give the run directory or the torch model",
        )

    def unchanged(x: Tensor, y: Tensor, generator: torch.Generator, advance: Advance) -> tuple[Tensor, int]:
        advance(len(x))
        return x, len(x)

    return (Step(CLEAN, unchanged, placement.images), *found)


def from_(name: str) -> str:
    """The suffix of attacks whose images were made on another network."""
    return f"-from-{name}"


def _with_gradients(job: Job) -> dict[str, Attack]:
    return {name: attack for name, attack in job.attacks.items() if attack.gradients}


def _climbing(
    network: nn.Module, job: Job, placement: ExecutionConfig, *, goes_on: bool, then: Sequence[Step] = ()
) -> list[Step]:
    """The attacks with gradients of a network; after the first the one that continues past success, and `then`."""
    found = [
        Step(name, _crafting(attack, network, job), placement.images)
        for name, attack in _with_gradients(job).items()
    ]
    more: list[Step] = []
    if goes_on and job.table.name in GO_ON:
        name, craft = GO_ON[job.table.name]
        more = [Step(f"{name}{TO_THE_END}", craft(network, job), placement.images)]
    return [*found[:1], *more, *then, *found[1:]]


def _crafting(attack: Attack, network: nn.Module, job: Job) -> Craft:
    def craft(x: Tensor, y: Tensor, generator: torch.Generator, advance: Advance) -> tuple[Tensor, int]:
        found = attack(network, x, y.to(x.device), job.ball, generator, advance)
        return found.images, int(found.queries.sum())

    return craft


def _without_gradients(
    name: str, attack: Attack, job: Job, victim: ModelUnderAttack, placement: ExecutionConfig
) -> Step:
    """An attack without gradients, on the artifact itself or on a copy of it with large batches."""
    answers: Logits = victim.fast or victim.answers

    def craft(x: Tensor, y: Tensor, generator: torch.Generator, advance: Advance) -> tuple[Tensor, int]:
        with torch.no_grad():
            found = attack(answers, x, y.to(x.device), job.ball, generator, advance)
        return found.images, int(found.queries.sum())

    return Step(name, craft, placement.images if victim.is_network else Tensor.cpu)


MOST = 256
# What one batch may take of the memory: so much, and a quarter of what is free.
BUDGET_BYTES = 2 * 2**30
SHARE = 0.25
# Beside the layers' outputs, their gradients and what an attack keeps of each image.
TIMES = 3


def batch_size(network: nn.Module | None, x: Tensor) -> int:
    """A power of two from 1 to 256."""
    if network is None:
        return MOST
    budget = min(BUDGET_BYTES, SHARE * _free_bytes(x.device))
    fits = budget / max(1, TIMES * _outputs_bytes(network, x))
    return 1 << max(0, min(MOST, int(fits)).bit_length() - 1)


def _outputs_bytes(network: nn.Module, x: Tensor) -> int:
    total = x.numel() * x.element_size()

    def count(_: nn.Module, __: Any, output: Any) -> None:
        nonlocal total
        if isinstance(output, Tensor):
            total += output.numel() * output.element_size()

    layers = [layer for layer in network.modules() if next(layer.children(), None) is None]
    with temporary_hooks(layer.register_forward_hook(count) for layer in layers), torch.no_grad():
        logits(network, x)
    return total


def _free_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError):  # not told by the system
        return float(BUDGET_BYTES)
