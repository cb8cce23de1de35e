"""APGD: gradient steps with momentum whose size halves, image by image, when the loss stops rising.

F. Croce and M. Hein, Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
attacks, ICML 2020, algorithm 1. Broken images are taken out at once; the others do not depend on them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeprune.attacks._base import Inputs
from edgeprune.models import (
    AttackResult,
    Logits,
    as_logits,
    by_image,
    in_parallel,
    lengths,
    loss_and_gradient,
    sequentially,
    wrong,
)
from edgeprune.train import Ball

# Section 3 of the paper: the first checkpoint, how much shorter each period is, and the shortest, as shares of the
# steps; the share of the last move in a step; and the size of the first steps, in radii.
FIRST_PERIOD, SHORTER, SHORTEST = 0.22, 0.03, 0.06
MOMENTUM = 0.75
FIRST_STEP = 2.0
# The targeted DLR loss divides by the distance of the largest logit from the third and the fourth.
DLR_CLASSES = 4
TINY = 1e-12

# Logits (N, K), labels (N,) and targets (N,) to losses (N,).
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Task:
    """x: float (N, C, H, W) in [0, 1]; y: int64 (N,), their classes; target: int64 (N,), others to be mistaken for."""

    x: Tensor
    y: Tensor
    target: Tensor

    def only(self, rows: Tensor) -> Task:
        """The part for some images: bool (N,) or int64 (n,)."""
        return Task(self.x[rows], self.y[rows], self.target[rows])


@dataclass(frozen=True)
class _Walk:
    """State of the images that are not broken, each (n, ...). low, high: bounds of the ball in [0, 1], for Linf."""

    row: Tensor
    x: Tensor
    y: Tensor
    target: Tensor
    low: Tensor
    high: Tensor
    at: Tensor
    before: Tensor
    gradient: Tensor
    loss: Tensor
    best: Tensor
    best_gradient: Tensor
    best_loss: Tensor
    step: Tensor
    rises: Tensor
    best_at_check: Tensor
    halved: Tensor

    def only(self, rows: Tensor) -> _Walk:
        return _Walk(*(getattr(self, field.name)[rows] for field in fields(self)))


def cross_entropies(logits: Tensor, y: Tensor, _target: Tensor) -> Tensor:
    """(N,)."""
    return functional.cross_entropy(logits, y, reduction="none")


def targeted_dlr(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """The targeted difference of logits ratio (eq. 9), (N,): how near the target is, whatever the logits' scale.

    -(z_y - z_t) / (z_1st - (z_3rd + z_4th) / 2). With fewer than four classes there is no fourth logit, and it is
    the bare margin z_t - z_y: the steps take the gradient's direction alone, so its scale does not matter.
    """
    row = torch.arange(len(y), device=y.device)
    margin = logits[row, target] - logits[row, y]
    if logits.shape[1] < DLR_CLASSES:
        return margin
    top = logits.topk(DLR_CLASSES, dim=1).values
    return margin / (top[:, 0] - 0.5 * (top[:, 2] + top[:, 3]) + TINY)


def targets(logits: Tensor, y: Tensor, count: int) -> Tensor:
    """The classes that are likeliest except the right one, (N, min(count, K - 1)), likeliest first."""
    others = logits.scatter(1, y.unsqueeze(1), -torch.inf)
    return others.sort(dim=1, descending=True).indices[:, : min(count, logits.shape[1] - 1)]


def climb_in_turn(
    given: Inputs, runs: Sequence[Tensor], *, loss: Loss, steps: int, rho: float
) -> tuple[Tensor, Tensor]:
    """One run for each of the target classes (N,) in `runs`, on the images that are not broken yet."""

    def run(target: Tensor, rows: Tensor) -> AttackResult:
        task = Task(given.x, given.y, target).only(rows)
        return climb(
            given.model, task, given.ball, loss=loss, steps=steps, rho=rho, generator=given.generator
        )

    return sequentially(given.x, [partial(run, target) for target in runs], given.advance)


def climb(  # noqa: PLR0913
    model: nn.Module | Logits,
    task: Task,
    ball: Ball,
    *,
    loss: Loss,
    steps: int,
    rho: float,
    generator: torch.Generator,
) -> AttackResult:
    """One run of algorithm 1 from a random point of the ball's surface; steps + 1 queries of an unbroken image.

    Returns the point that broke an image, or else the one with the largest loss.
    """
    start = _surface(task.x, ball, generator)

    def part(one: nn.Module | Logits, rows: Tensor) -> AttackResult:
        return _climbed(as_logits(one), _start(task.only(rows), ball, start[rows]), ball, loss, steps, rho)

    return in_parallel(model, torch.arange(len(start), device=start.device), part)


def _climbed(logits: Logits, walk: _Walk, ball: Ball, loss: Loss, steps: int, rho: float) -> AttackResult:
    found = walk.x.clone()
    broken = torch.zeros(len(found), dtype=torch.bool, device=found.device)
    queries = torch.zeros(len(found), dtype=torch.int64, device=found.device)
    period, since = max(int(FIRST_PERIOD * steps), 1), 0
    for step in range(steps + 1):
        if step:
            walk = _moved(walk, ball, MOMENTUM if step > 1 else 1.0)
        output, losses, gradient = _evaluated(logits, walk, loss, step < steps)
        out = wrong(output, walk.y)
        queries[walk.row] += 1
        if out.any():
            found[walk.row[out]], broken[walk.row[out]] = walk.at[out], True
            stay = ~out
            walk, losses, gradient = walk.only(stay), losses[stay], gradient[stay]
            if not len(walk.row):
                break
        walk = _noted(walk, losses, gradient) if step else _noted_first(walk, losses, gradient)
        since += step > 0
        if since == period:
            walk = _checked(walk, rho * period)
            period = max(period - max(int(SHORTER * steps), 1), int(SHORTEST * steps), 1)
            since = 0
    found[walk.row] = walk.best
    return AttackResult(found, broken, queries)


def _evaluated(logits: Logits, walk: _Walk, loss: Loss, uphill: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, losses (NaN as the least) and gradients; after the last step no gradient is needed."""
    if uphill:
        output, losses, gradient = loss_and_gradient(logits, walk.at, lambda a: loss(a, walk.y, walk.target))
    else:
        with torch.no_grad():
            output, gradient = logits(walk.at), walk.gradient
            losses = loss(output, walk.y, walk.target)
    return output, torch.where(losses.isnan(), -torch.inf, losses), gradient


def _start(task: Task, ball: Ball, at: Tensor) -> _Walk:
    x, count = task.x, len(task.x)
    none = torch.zeros(count, device=x.device)
    yes = torch.ones(count, dtype=torch.bool, device=x.device)
    row = torch.arange(count, device=x.device)
    size = torch.full((count,), FIRST_STEP * ball.eps, device=x.device)
    low, high = none, none
    if ball.norm == "Linf":
        low, high = (x - ball.eps).clamp_(0, 1), (x + ball.eps).clamp_(0, 1)
    # There is no gradient yet; (n,) takes its place. `best` is written into.
    return _Walk(
        row, x, task.y, task.target, low, high, at, at, none, none, at.clone(), none, none, size, none, none, yes
    )  # fmt: skip


def _surface(x: Tensor, ball: Ball, generator: torch.Generator) -> Tensor:
    """Random points that are `eps` away from `x` before they are clipped to [0, 1]."""
    if ball.norm == "Linf":
        noise = 2 * torch.rand(x.shape, generator=generator) - 1
    else:
        noise = torch.randn(x.shape, generator=generator)
    noise = noise / by_image(lengths(noise, ball.norm).clamp_min(TINY), noise)
    return (x + ball.eps * noise.to(x)).clamp(0, 1)


def _moved(walk: _Walk, ball: Ball, share: float) -> _Walk:
    """Lines 7 and 8: a step of the gradient, mixed with the last move."""
    size = by_image(walk.step, walk.at)
    if ball.norm == "Linf":
        uphill = walk.gradient.sign().nan_to_num_(nan=0.0)
        at = torch.addcmul(walk.at, size, uphill).clamp_(walk.low, walk.high)
    else:
        uphill = ball.step(walk.gradient.new_zeros(()), walk.gradient, 1.0)
        at = ball.project(walk.at + size * uphill, walk.x)
    if share < 1:
        at = torch.lerp(walk.at, at, share).add_(walk.at - walk.before, alpha=1 - share)
        at = at.clamp_(walk.low, walk.high) if ball.norm == "Linf" else ball.project(at, walk.x)
    return replace(walk, at=at, before=walk.at)


def _noted_first(walk: _Walk, losses: Tensor, gradient: Tensor) -> _Walk:
    return replace(
        walk,
        gradient=gradient,
        loss=losses,
        best_gradient=gradient.clone(),
        best_loss=losses,
        best_at_check=losses,
    )


def _noted(walk: _Walk, losses: Tensor, gradient: Tensor) -> _Walk:
    """Lines 9 to 11: whether the loss rose, and whether it is the best so far."""
    better = losses > walk.best_loss
    row = better.nonzero().squeeze(1)
    # Written into: whole images are copied faster than pixels are chosen one by one.
    walk.best[row], walk.best_gradient[row] = walk.at[row], gradient[row]
    return replace(
        walk,
        gradient=gradient,
        rises=walk.rises + (losses > walk.loss),
        loss=losses,
        best_loss=torch.where(better, losses, walk.best_loss),
    )


def _checked(walk: _Walk, enough: float) -> _Walk:
    """Lines 12 to 16: halve the step and go back to the best point, where one of the two conditions holds.

    Too few steps raised the loss; or the step was not halved at the last checkpoint and nothing better was found since.
    """
    halve = (walk.rises <= enough) | (~walk.halved & (walk.best_at_check >= walk.best_loss))
    pixels = by_image(halve, walk.at)
    return replace(
        walk,
        step=torch.where(halve, walk.step / 2, walk.step),
        at=torch.where(pixels, walk.best, walk.at),
        gradient=torch.where(pixels, walk.best_gradient, walk.gradient),
        rises=torch.zeros_like(walk.rises),
        best_at_check=walk.best_loss,
        halved=halve,
    )
