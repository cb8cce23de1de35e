"""FAB: the nearest image that is classified otherwise, by steps onto the linearized decision boundary.

F. Croce and M. Hein, Minimally distorted adversarial examples with a fast adaptive boundary attack, ICML 2020,
algorithm 1, with one target class (section 4 of their AutoAttack). The projections are solved by Newton's method
instead of by sorting.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edgeprune.nn.apgd import Task
from edgeprune.nn.asking import Logits, by_image, lengths, slope, wrong

__all__ = ["Nearest", "nearest", "onto_plane"]

# The paper's parameters: at most so much of a step is towards the image itself, a step goes so much beyond the
# boundary, and from behind it so much of the way back is kept.
ALPHA_MAX, ETA, BETA = 0.1, 1.05, 0.9
# Newton on a concave, piecewise linear function of one variable ends at the last piece; more than 10 are rare.
NEWTON_STEPS = 64
NEWTON_TOLERANCE = 1e-6
HUGE = 1e30
SHORTEST = 1e-8


@dataclass(frozen=True)
class Nearest:
    """The nearest images found that are wrong.

    images: float (N, C, H, W); x where none was found. distance: float (N,), from x; inf where none was found.
    queries: int64 (N,), how often each image was asked about.
    """

    images: Tensor
    distance: Tensor
    queries: Tensor


def nearest(answers: Logits, task: Task, norm: str, *, steps: int, enough: float = 0.0) -> Nearest:
    """Walk along the boundary to a target class, ever nearer to the images.

    No chance is drawn: it starts at the images. Each step asks twice, once with a gradient.

    Args:
        answers: pixels to logits; gradients pass.
        task: images, labels, and the class behind whose boundary to look.
        norm: "Linf" or "L2": in which to be near.
        steps: at most so many.
        enough: an image is left in peace when it is wrong at this distance.
    """
    images = task.x.clone()
    distance = torch.full((len(images),), torch.inf, device=images.device)
    queries = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    row = torch.arange(len(images), device=images.device)
    part, at = task, task.x
    for _ in range(steps):
        at = _stepped(answers, part, at, norm)
        with torch.no_grad():
            out = wrong(answers(at), part.y)
        queries[row] += 2
        far = torch.where(out, lengths(at - part.x, norm), torch.inf)
        closer = far < distance[row]
        images[row[closer]], distance[row[closer]] = at[closer], far[closer]
        at = torch.where(by_image(out, at), part.x + (at - part.x) * BETA, at)
        stay = distance[row] > enough
        if not stay.all():
            part, at, row = part.only(stay), at[stay], row[stay]
            if not len(row):
                break
    return Nearest(images, distance, queries)


def _stepped(answers: Logits, task: Task, at: Tensor, norm: str) -> Tensor:
    """Eq. 9 and 10: from the last point and from the image onto the boundary, beyond it, and between the two."""
    row = torch.arange(len(at), device=at.device)
    _, ahead, normal = slope(answers, at, lambda a: a[row, task.target] - a[row, task.y])
    normal = torch.nan_to_num(normal)
    home = ahead + (normal * (task.x - at)).flatten(1).sum(1)
    points = torch.cat([at, task.x])
    change = onto_plane(points, torch.cat([normal, normal]), torch.cat([ahead, home]), norm)
    reach = lengths(change, norm).clamp_min(SHORTEST)
    near, far = reach.split(len(at))
    alpha = by_image((near / (near + far)).clamp(0, ALPHA_MAX), at)
    onward, back = (points + ETA * change).split(len(at))
    return torch.lerp(onward, back, alpha).clamp(0, 1)


def onto_plane(points: Tensor, normal: Tensor, value: Tensor, norm: str) -> Tensor:
    """The shortest change that brings each point onto a hyperplane and leaves it in [0, 1] (eq. 4 of the paper).

    With m_i the size of the change of pixel i, room_i how far it may go and w its normal, m_i = min(t q_i, room_i)
    with q_i = 1 in Linf and |w_i| in L2, and t such that sum |w_i| m_i = |value|. That sum is concave and piecewise
    linear in t: Newton's method from 0 comes nearer from below and ends exactly.

    Args:
        points: float (N, ...) in [0, 1].
        normal: like `points`.
        value: float (N,), normal . (point - a point of the plane).
        norm: "Linf" or "L2".

    Returns:
        Like `points`. Where the cube does not reach the plane, the corner that is nearest to it; where the normal
        is 0, no change.
    """
    largest = normal.abs().flatten(1).amax(1)
    scale = torch.where(largest > 0, largest, torch.ones_like(largest))
    weight = normal / by_image(scale, normal)
    missing = torch.nan_to_num(value.abs() / scale, nan=0.0).clamp_max(HUGE)
    down = (weight > 0) == by_image(value >= 0, weight)
    room = torch.where(down, points, 1 - points)
    weight = weight.abs()
    rate = (weight > 0).to(weight) if norm == "Linf" else weight
    time = torch.zeros_like(missing)
    sizes = torch.zeros_like(points)
    for _ in range(NEWTON_STEPS):
        free = weight * rate * (by_image(time, rate) * rate < room)
        speed = free.flatten(1).sum(1)
        rest = missing - (weight * sizes).flatten(1).sum(1)
        going = (rest > NEWTON_TOLERANCE * missing) & (speed > 0)
        if not going.any():
            break
        time = torch.where(going, time + rest / speed.clamp_min(1 / HUGE), time).clamp_max(HUGE)
        sizes = torch.minimum(by_image(time, rate) * rate, room)
    return torch.where(down, -sizes, sizes)
