"""FAB: the nearest image that is classified otherwise, by steps onto the linearized decision boundary.

F. Croce and M. Hein, Minimally distorted adversarial examples with a fast adaptive boundary attack, ICML 2020,
algorithm 1, with one target class (section 4 of their AutoAttack). The projections are solved by Newton's method
instead of by sorting.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from edgeprune.attacks._apgd import Task
from edgeprune.models import Logits, by_image, lengths, loss_and_gradient, wrong

# The paper's parameters: at most so much of a step is towards the image itself, a step goes so much beyond the
# boundary, and of the way back from there so much is kept.
ALPHA_MAX, ETA, BETA = 0.1, 1.05, 0.9
# Newton on a concave, piecewise linear function of one variable ends at the last piece; more than 10 are rare.
NEWTON_STEPS = 64
NEWTON_TOLERANCE = 1e-6
HUGE = 1e30
# Images that are projected at a time, so that they stay in the processor's cache.
ROWS = 8
SHORTEST = 1e-8


@dataclass(frozen=True)
class Nearest:
    """The nearest misclassified images; x with distance inf where none was found. distance: float (N,), from x."""

    images: Tensor
    distance: Tensor
    queries: Tensor


def nearest(
    logits: Logits, task: Task, norm: str, *, steps: int, enough: float = 0.0, look: Logits | None = None
) -> Nearest:
    """Walk along the boundary to a target class, ever nearer to the images.

    Deterministic: it starts at the images. Each step takes two queries, one with a gradient.
    """
    images = task.x.clone()
    distance = torch.full((len(images),), torch.inf, device=images.device)
    queries = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    row = torch.arange(len(images), device=images.device)
    part, at = task, task.x
    for _ in range(steps):
        at = _stepped(logits, part, at, norm)
        with torch.no_grad():
            out, length = wrong((look or logits)(at), part.y), lengths(at - part.x, norm)
            sure = out & (length <= enough)
            if look is not None and sure.any():
                out[sure] = wrong(logits(at[sure]), part.y[sure])
        queries[row] += 2
        far = torch.where(out, length, torch.inf)
        closer = far < distance[row]
        images[row[closer]], distance[row[closer]] = at[closer], far[closer]
        at = torch.where(by_image(out, at), part.x + (at - part.x) * BETA, at)
        stay = distance[row] > enough
        if not stay.all():
            part, at, row = part.only(stay), at[stay], row[stay]
            if not len(row):
                break
    return Nearest(images, distance, queries)


def _stepped(logits: Logits, task: Task, at: Tensor, norm: str) -> Tensor:
    """Eq. 9 and 10: from the last point and from the image onto the boundary, beyond it, and between the two."""
    row = torch.arange(len(at), device=at.device)
    _, ahead, normal = loss_and_gradient(logits, at, lambda a: a[row, task.target] - a[row, task.y])
    normal = _flat(torch.nan_to_num(normal), at)
    points = torch.stack([_flat(at, at), _flat(task.x, at)])
    home = ahead + _dot(normal, points[1] - points[0])
    change = _shortest(points, normal, torch.stack([ahead, home]), norm)
    reach = lengths(change.flatten(0, 1), norm).clamp_min(SHORTEST)
    near, far = reach.split(len(at))
    alpha = (near / (near + far)).clamp(0, ALPHA_MAX).unsqueeze(1)
    onward, back = points.add_(change, alpha=ETA)
    return _as_images(torch.lerp(onward, back, alpha).clamp_(0, 1), at)


def onto_plane(points: Tensor, normal: Tensor, value: Tensor, norm: str) -> Tensor:
    """The shortest change that brings each point onto a hyperplane and leaves it in [0, 1] (eq. 4 of the paper).

    Where the cube does not reach the plane, the change leads to the corner that is nearest to it.
    """
    flat = points.flatten(1).unsqueeze(0)
    return _shortest(flat, normal.flatten(1), value.unsqueeze(0), norm).view(points.shape)


def _shortest(points: Tensor, normal: Tensor, value: Tensor, norm: str) -> Tensor:
    """`onto_plane` for R points (R, N, F) with the same normals (N, F) and values (R, N); some rows at a time."""
    found = torch.empty_like(points)
    for first in range(0, len(normal), ROWS):
        rows = slice(first, first + ROWS)
        found[:, rows] = _solved(points[:, rows], normal[rows], value[:, rows], norm)
    return found


def _solved(points: Tensor, normal: Tensor, value: Tensor, norm: str) -> Tensor:
    largest = normal.abs().amax(1, keepdim=True)
    scale = torch.where(largest > 0, largest, torch.ones_like(largest))
    weight = normal / scale
    missing = torch.nan_to_num(value.abs() / scale.squeeze(1), nan=0.0).clamp_max(HUGE)
    # 1 where a pixel goes down, -1 where it goes up, 0 where it has no weight and stays.
    way = weight.sign() * torch.where(value >= 0, 1.0, -1.0).unsqueeze(2)
    room = (points - 0.5).mul_(way).add_(0.5)
    weight.abs_()
    gain = weight if norm == "Linf" else weight.square()
    time = (missing / gain.sum(1).clamp_min(1 / HUGE)).clamp_max(HUGE)
    sizes = room
    for _ in range(NEWTON_STEPS):
        reach = time.unsqueeze(2) if norm == "Linf" else time.unsqueeze(2) * weight
        sizes = torch.minimum(reach, room)
        rest = missing - (weight * sizes).sum(2)
        speed = (gain * (reach < room)).sum(2)
        going = (rest > NEWTON_TOLERANCE * missing) & (speed > 0)
        if not going.any():
            break
        time = torch.where(going, time + rest / speed.clamp_min(1 / HUGE), time).clamp_max(HUGE)
    return sizes.mul_(way).neg_()


def _dot(one: Tensor, other: Tensor) -> Tensor:
    return torch.bmm(one.unsqueeze(1), other.unsqueeze(2)).flatten()


def _flat(images: Tensor, like: Tensor) -> Tensor:
    """Pixels (N, F) in the order in which `like` lies in memory: nothing is copied where `images` lie so too."""
    last = like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous()
    return (images.permute(0, 2, 3, 1) if last else images).flatten(1)


def _as_images(flat: Tensor, like: Tensor) -> Tensor:
    count, channels, height, width = like.shape
    last = like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous()
    return flat.view(count, height, width, channels).permute(0, 3, 1, 2) if last else flat.view(like.shape)
