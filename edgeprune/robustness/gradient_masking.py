"""Signs that an accuracy under attack is too good to be true, as plain sentences.

After Athalye et al. 2018, "Obfuscated Gradients Give a False Sense of Security", section 3.1, and Carlini et al. 2019,
"On Evaluating Adversarial Robustness", section 3.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edgeprune import plugins
from edgeprune.confidence import binomial
from edgeprune.data import Split
from edgeprune.models import folded, full, logits, on_replicas
from edgeprune.quantities import USUAL_EPS
from edgeprune.robustness.attack_plan import NO_GRADIENT, placed, reaches
from edgeprune.robustness.job import Job, ModelUnderAttack, Verdicts, ask, wrong
from edgeprune.train import Ball, ExecutionConfig, crafting, cross_entropy, pgd, seeded_generator

# Images that are probed; attacks of many steps take the first few of them.
LOOKED_AT = 64
TRIED = 16
# A few images decide otherwise by chance; these shares do not.
FEW = 0.1
SLIGHT = 0.01
STEPS, MANY_STEPS = 10, 100
PROBE_QUERIES = 200
# Instead of NO_GRADIENT, where every attack needs gradients.
AT_RANDOM = (
    "No gradient reaches the network's input (detach, argmax or rounding in its forward): the attacks went in random "
    "directions, which overstates robustness. Take --attack standard, which asks without gradients too."
)
# Difference of two outputs for the same batch, relative to the largest logit.
NOISE = 1e-5


@dataclass(frozen=True, eq=False)
class _Probe:
    """Some images that are classified right without an attack, and the verdicts on all images."""

    victim: ModelUnderAttack
    job: Job
    verdicts: Verdicts
    x: Tensor
    y: Tensor
    placement: ExecutionConfig


def flags(victim: ModelUnderAttack, split: Split, job: Job, verdicts: Verdicts) -> tuple[str, ...]:
    """What a reader must know before believing the accuracy under attack; empty when nothing looks wrong."""
    rows = [row for row, right in enumerate(verdicts.clean_right) if right][:LOOKED_AT]
    if not rows:
        return (*_guessing(split, victim, verdicts), *_everything(split, job))
    with placed(victim, split) as placement:
        x = placement.images(split.take(torch.tensor(rows)))
        probe = _Probe(victim, job, verdicts, x, split.labels[rows], placement)
        found = [*_guessing(split, victim, verdicts), *_everything(split, job)]
        found += [*_random(probe), *_probabilities(probe), *_black_box(probe)]
        if victim.twin is None:
            return tuple(found)
        if not reaches(victim.twin, x[:1]):
            asked = any(not attack.gradients for attack in job.attacks.values())
            return (*found, NO_GRADIENT if asked else AT_RANDOM, *_queries(probe))
        checks: Sequence[Callable[[_Probe], list[str]]] = (_zero_gradients, _other_attacks, _queries)
        return (*found, *(line for check in checks for line in check(probe)))


def _guessing(split: Split, victim: ModelUnderAttack, verdicts: Verdicts) -> list[str]:
    n, right = len(verdicts.by), sum(verdicts.clean_right)
    classes = len(split.labels.unique())
    if classes < 2 or binomial(right, n)[0] > 1 / classes:
        return []
    return [
        f"Without an attack {victim.name} is right on {right} of {n} images, no better than guessing: look at the "
        "normalization (--mean, --std) and at the order of the classes."
    ]


def _everything(split: Split, job: Job) -> list[str]:
    channels, height, width = split.take(torch.arange(1)).shape[1:]
    norm, eps = job.ball.norm, job.ball.eps
    gray = 0.5 if norm == "Linf" else 0.5 * (channels * height * width) ** 0.5
    if eps < gray:
        return []
    return [
        f"{norm} eps {eps:.4g} is so large that any image of {channels}x{height}x{width} may become gray all over, "
        f"which is at most {gray:.3g} away: no model can tell them apart then, so the accuracy under attack says "
        f"nothing. Pixels are in [0, 1]; a usual radius is {255 * USUAL_EPS[norm]:g}/255."
    ]


def _random(probe: _Probe) -> list[str]:
    first, second = (ask(probe.victim.answers, probe.x) for _ in range(2))
    scale = float(first.abs().max()) or 1.0
    apart = float((first - second).abs().max())
    if apart <= NOISE * scale:
        return []
    return [
        f"The model answers the same images differently each time (by up to {apart / scale:.1e} of the largest "
        "logit): attacks are made against a moving target, and the accuracy under attack is overstated."
    ]


def _probabilities(probe: _Probe) -> list[str]:
    answer = ask(probe.victim.answers, probe.x)
    ones = (answer.sum(1) - 1).abs().max() < 1e-4
    if not bool(ones) or float(answer.min()) < 0:
        return []
    return [
        "The answers are probabilities (not negative, and they sum to 1), not logits: the gradients of attacks vanish "
        "where the model is sure. Take the softmax off the model and evaluate it again."
    ]


def _black_box(probe: _Probe) -> list[str]:
    with_gradients = [n for n, a in probe.job.attacks.items() if a.gradients and n in probe.verdicts.tried]
    asking = [n for n, a in probe.job.attacks.items() if not a.gradients]
    broken = sum(probe.verdicts.broken.get(name, 0) for name in asking)
    # One or two of a few images say nothing: the whole interval of the share must lie above.
    if not with_gradients or binomial(broken, len(probe.verdicts.by))[0] <= SLIGHT:
        return []
    return [
        f"{', '.join(asking)}, which only asks, broke {broken} image{'s' * (broken != 1)} that the attacks with "
        "gradients left: the gradients are masked, so a stronger attack may break more."
    ]


def _zero_gradients(probe: _Probe) -> list[str]:
    assert probe.victim.twin is not None
    with crafting(probe.victim.twin), torch.enable_grad():
        point = probe.x.detach().requires_grad_()
        loss = cross_entropy(full(logits(probe.victim.twin, point)), probe.y.to(point.device))
        gradient = torch.autograd.grad(loss, point)[0].flatten(1)
    useless = int(((gradient == 0).all(1) | ~gradient.isfinite().all(1)).sum())
    if useless <= FEW * len(probe.x):
        return []
    return [
        f"The gradient of the cross-entropy is zero or not finite on {useless} of {len(probe.x)} images: attacks "
        "that climb it (FGSM, PGD) go nowhere there, and what they leave standing says nothing."
    ]


def _other_attacks(probe: _Probe) -> list[str]:
    """PGD with more steps, a larger ball and all images there are: each must leave fewer standing."""
    n, eps, norm = min(TRIED, len(probe.x)), probe.job.ball.eps, probe.job.ball.norm
    whole = 1.0 if norm == "Linf" else probe.x[0].numel() ** 0.5
    few = _standing(probe, probe.job.ball, STEPS)
    many = _standing(probe, probe.job.ball, MANY_STEPS)
    wider = _standing(probe, Ball(norm, min(2 * eps, whole)), STEPS)
    everything = _standing(probe, Ball(norm, whole), MANY_STEPS)
    slack, found = FEW * n, []
    if many > few + slack:
        found.append(
            f"PGD with {MANY_STEPS} steps leaves {many} of {n} images standing, with {STEPS} steps {few}: more steps "
            "must not help the model. The gradients mislead."
        )
    if wider > few + slack:
        found.append(
            f"PGD with twice the eps leaves {wider} of {n} images standing, with eps itself {few}: a larger ball "
            "must not help the model. The gradients mislead."
        )
    if everything > slack:
        found.append(
            f"PGD leaves {everything} of {n} images standing when it may change them into any other image "
            f"({norm} eps {whole:.3g}): it does not find what is there, so the accuracy under attack is overstated."
        )
    return found


def _standing(probe: _Probe, ball: Ball, steps: int) -> int:
    twin = probe.victim.twin
    assert twin is not None
    x, y = probe.x[:TRIED], probe.y[:TRIED]
    generator = seeded_generator(probe.job.seed, "flags", ball.eps)
    with crafting(twin), on_replicas(folded(twin, x[:1]), x) as quick:
        images = pgd(quick, x, y.to(x.device), ball, steps=steps, generator=generator)
    return int((~wrong(probe.victim.answers, images, y)).sum())


def _queries(probe: _Probe) -> list[str]:
    """Where every attack needed gradients: a short attack without, on images that survived."""
    if any(not attack.gradients for attack in probe.job.attacks.values()):
        return []
    rows = [row for row, right in enumerate(probe.verdicts.clean_right) if right][: len(probe.x)]
    left = [place for place, row in enumerate(rows) if not probe.verdicts.by[row]]
    if not left:
        return []
    victim = probe.victim
    x, y = probe.x[left], probe.y[left]
    x = x if victim.is_network else x.cpu()
    attack = plugins.build("attacks", "square", {"queries": PROBE_QUERIES})
    with torch.no_grad():
        found = attack(
            victim.fast or victim.answers, x, y.to(x.device), probe.job.ball,
            seeded_generator(probe.job.seed, "flags", "square"),
        )  # fmt: skip
    broken = int(wrong(victim.answers, found.images, y).sum())
    if broken <= max(1, FEW * len(left)):
        return []
    names = ", ".join(probe.job.attacks)
    return [
        f"{PROBE_QUERIES} queries of Square, which only asks, broke {broken} of {len(left)} images that {names} left: "
        "the gradients are masked. Take --attack standard."
    ]
