"""Attacks that go on when the network in torch is wrong: the file, which rounds otherwise, may still be right then."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeprune.nn import perturb
from edgeprune.nn.apgd import Task, climb, cross_entropies
from edgeprune.nn.calling import logits
from edgeprune.nn.folding import folded
from edgeprune.nn.lanes import in_lanes
from edgeprune.nn.perturb import crafting, full
from edgeprune.stages.attack_job import Job

__all__ = ["Advance", "Craft", "apgd_ce", "pgd"]

# AutoAttack's own numbers for APGD-CE.
STEPS, RHO = 100, 0.75

Advance = Callable[[int], None]
# (x, y, generator, advance) -> images to try (N, C, H, W), forward passes for one image summed over them.
Craft = Callable[[Tensor, Tensor, torch.Generator, Advance], tuple[Tensor, int]]


def apgd_ce(network: nn.Module, job: Job) -> Craft:
    """APGD-CE that takes no image for broken: to the logits comes a class that is always the likeliest, and right."""

    def answers(quick: nn.Module, at: Tensor) -> Tensor:
        found = full(logits(quick, at))
        return torch.cat([found, found.detach().amax(1, keepdim=True) + 1], 1)

    def loss(answer: Tensor, _always: Tensor, label: Tensor) -> Tensor:
        return cross_entropies(answer[:, :-1], label, label)

    def craft(x: Tensor, y: Tensor, generator: torch.Generator, advance: Advance) -> tuple[Tensor, int]:
        label = y.to(x.device)
        with crafting(network), in_lanes(folded(network, x[:2]), x) as quick:
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
            found = perturb.pgd(network, x, label, job.ball, steps=steps, generator=generator)
            with crafting(network), torch.no_grad():
                loss = functional.cross_entropy(full(logits(network, found)), label, reduction="none")
            higher = loss > height
            best = torch.where(higher.view(-1, *[1] * (x.ndim - 1)), found, best)
            height = torch.where(higher, loss, height)
        advance(len(x))
        return best, walks * (steps + 1) * len(x)

    return craft
